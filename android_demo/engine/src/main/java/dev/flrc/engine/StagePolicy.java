package dev.flrc.engine;

/** Which stage computes the next token. */
public interface StagePolicy {
    /**
     * @param generated tokens of the answer so far
     * @param stage that computed the last token
     * @param lastMs milliseconds the last step took; 0 before the first one
     * @return the stage of the next token
     */
    int next(int generated, int stage, double lastMs);

    /** The stage that reads the prompt, and so computes the first token. */
    default int promptStage() {
        return 0;
    }

    /** Moves on at the token counts of the bundle's schedule. */
    static StagePolicy schedule(Manifest manifest) {
        return (generated, stage, lastMs) -> manifest.stageAt(generated);
    }

    /** One stage for all tokens. */
    static StagePolicy fixed(int only) {
        return scripted(only);
    }

    /** Entry i computes answer token i; entry 0 reads the prompt, the last one holds on. */
    static StagePolicy scripted(int... stages) {
        return new StagePolicy() {
            @Override
            public int next(int generated, int stage, double lastMs) {
                return stages[Math.min(generated, stages.length - 1)];
            }

            @Override
            public int promptStage() {
                return stages[0];
            }
        };
    }
}
