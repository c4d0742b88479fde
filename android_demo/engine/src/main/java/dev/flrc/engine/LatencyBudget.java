package dev.flrc.engine;

import java.util.HashMap;
import java.util.Map;

/** The earliest stage whose decode step stays within a time; the Python runtime's policy of that name. */
public final class LatencyBudget implements StagePolicy {
    private static final double SMOOTHING = 0.25; // weight of the newest step in the time of a stage
    private static final double MARGIN = 0.9; // of the budget, under which an earlier stage is tried again
    private static final int PATIENCE = 8; // tokens on a stage before that

    private final double budget;
    private final int stages;
    private final Map<Integer, Double> times = new HashMap<>(); // ms of a step by stage, as last seen
    private int stayed;

    /**
     * @param milliseconds a token may take
     * @param stages of the bundle
     */
    public LatencyBudget(double milliseconds, int stages) throws FlrcException {
        if (!(milliseconds > 0) || Double.isInfinite(milliseconds)) {
            throw new FlrcException("a latency budget of " + milliseconds + " ms is not positive");
        }
        this.budget = milliseconds;
        this.stages = stages;
    }

    @Override
    public int next(int generated, int stage, double lastMs) {
        if (generated <= 1) {
            stayed = 0;
        }
        if (lastMs > 0) {
            Double before = times.get(stage);
            double now = before == null ? lastMs : before + SMOOTHING * (lastMs - before);
            if (before != null) { // what slows one stage down, another program or heat, slows all
                for (Map.Entry<Integer, Double> entry : times.entrySet()) {
                    entry.setValue(entry.getValue() * now / before);
                }
            }
            times.put(stage, now);
        }
        stayed++;
        int chosen = chosen(stage);
        if (chosen != stage) {
            stayed = 0;
        }
        return chosen;
    }

    private int chosen(int now) {
        Double time = times.get(now);
        if (time == null) {
            return now;
        }
        if (time > budget) {
            return stayed >= 2 ? Math.min(now + 1, stages - 1) : now; // a single slow step is noise
        }
        if (now > 0 && stayed >= PATIENCE && times.getOrDefault(now - 1, 0.0) <= MARGIN * budget) {
            return now - 1;
        }
        return now;
    }
}
