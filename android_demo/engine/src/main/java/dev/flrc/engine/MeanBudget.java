package dev.flrc.engine;

/**
 * The earliest stages that keep the mean share of activated parameters of an answer within a budget; it holds at the end
 * of every block of tokens. The Python runtime's policy of that name.
 */
public final class MeanBudget implements StagePolicy {
    private static final int BLOCK = 16; // tokens between two decisions

    private final double mean;
    private final double[] kept;
    private double spent;
    private int stage;

    /**
     * @param mean share of the projections' parameters that a token may activate on average
     * @param kept share of each stage, falling
     */
    public MeanBudget(double mean, double... kept) throws FlrcException {
        for (int i = 1; i < kept.length; i++) {
            if (kept[i] > kept[i - 1]) {
                throw new FlrcException("the shares of the stages must be given and must not grow");
            }
        }
        if (kept.length == 0 || !(mean >= kept[kept.length - 1])) {
            throw new FlrcException("a mean of " + mean + " is below the share of the last stage");
        }
        this.mean = mean;
        this.kept = kept.clone();
    }

    @Override
    public int next(int generated, int last, double lastMs) {
        if (generated <= 1) {
            spent = 0;
            stage = last;
        }
        spent += kept[last]; // of the token before this one
        if (generated <= 1 || generated % BLOCK == 0) {
            int ahead = BLOCK - generated % BLOCK;
            double left = mean * (generated + ahead) - spent;
            stage = kept.length - 1;
            for (int s = kept.length - 1; s >= 0; s--) {
                if (kept[s] * ahead <= left + 1e-9) {
                    stage = s;
                }
            }
        }
        return stage;
    }
}
