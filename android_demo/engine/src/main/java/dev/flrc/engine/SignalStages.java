package dev.flrc.engine;

/**
 * Later stages as an outside number falls, such as the battery's charge or the thermal headroom; the Python runtime's
 * policy of that name.
 */
public final class SignalStages implements StagePolicy {
    /** A number from outside, read before every token; NaN: nothing is known. */
    public interface Signal {
        double value();
    }

    private final Signal signal;
    private final double[] thresholds;
    private final double hysteresis;

    /**
     * @param signal the number
     * @param hysteresis how far it must rise over a threshold before that one's move is undone
     * @param thresholds falling: from {@code thresholds[i]} down to the next, stage i + 1 decodes
     */
    public SignalStages(Signal signal, double hysteresis, double... thresholds) throws FlrcException {
        for (int i = 1; i < thresholds.length; i++) {
            if (!(thresholds[i] < thresholds[i - 1])) {
                throw new FlrcException("the thresholds of a signal must fall");
            }
        }
        if (!(hysteresis >= 0)) {
            throw new FlrcException("a hysteresis of " + hysteresis + " is negative");
        }
        this.signal = signal;
        this.thresholds = thresholds.clone();
        this.hysteresis = hysteresis;
    }

    @Override
    public int next(int generated, int stage, double lastMs) {
        double value = signal.value();
        if (Double.isNaN(value)) {
            return Math.min(stage, thresholds.length);
        }
        int latest = 0;
        int earliest = 0;
        for (double threshold : thresholds) {
            latest += value < threshold ? 1 : 0;
            earliest += value < threshold + hysteresis ? 1 : 0;
        }
        return Math.min(Math.max(stage, latest), earliest);
    }
}
