package dev.flrc.engine;

/** Whichever of several policies asks for the latest stage. */
public final class Cheapest implements StagePolicy {
    private final StagePolicy[] policies;

    public Cheapest(StagePolicy... policies) throws FlrcException {
        if (policies.length == 0) {
            throw new FlrcException("name at least one policy");
        }
        this.policies = policies.clone();
    }

    @Override
    public int next(int generated, int stage, double lastMs) {
        int latest = 0;
        for (StagePolicy policy : policies) {
            latest = Math.max(latest, policy.next(generated, stage, lastMs));
        }
        return latest;
    }

    @Override
    public int promptStage() {
        int latest = 0;
        for (StagePolicy policy : policies) {
            latest = Math.max(latest, policy.promptStage());
        }
        return latest;
    }
}
