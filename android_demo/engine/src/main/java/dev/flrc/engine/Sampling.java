package dev.flrc.engine;

/** How tokens are chosen; the meaning of every number is the Python runtime's. */
public final class Sampling {
    /** The most likely token every time. */
    public static final Sampling GREEDY = new Sampling(0, 0, 1, 1, 0);

    final double temperature;
    final int topK;
    final double topP;
    final double repetitionPenalty;
    final long seed;

    private Sampling(double temperature, int topK, double topP, double repetitionPenalty, long seed) {
        this.temperature = temperature;
        this.topK = topK;
        this.topP = topP;
        this.repetitionPenalty = repetitionPenalty;
        this.seed = seed;
    }

    /**
     * @param temperature 0 is greedy, at most 100
     * @param topK draw among this many most likely tokens; 0 for all
     * @param topP draw among the fewest tokens whose probabilities sum to this or more; in (0, 1]
     * @param repetitionPenalty divides positive and multiplies negative logits of tokens seen before; in (0, 10]
     * @param seed of the draws, from 0 on
     */
    public static Sampling of(double temperature, int topK, double topP, double repetitionPenalty, long seed)
        throws FlrcException {
        check("temperature", temperature, temperature >= 0 && temperature <= 100, "from 0 to 100");
        check("top_k", topK, topK >= 0, "an integer from 0 on");
        check("top_p", topP, topP > 0 && topP <= 1, "in (0, 1]");
        check("repetition_penalty", repetitionPenalty, repetitionPenalty > 0 && repetitionPenalty <= 10, "in (0, 10]");
        check("seed", seed, seed >= 0, "from 0 on");
        return new Sampling(temperature, topK, topP, repetitionPenalty, seed);
    }

    private static void check(String name, Number value, boolean valid, String allowed) throws FlrcException {
        if (!valid) {
            throw new FlrcException(name + " " + value + " is not " + allowed);
        }
    }
}
