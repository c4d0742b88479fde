package dev.flrc.engine;

import java.nio.FloatBuffer;
import java.util.Arrays;
import java.util.BitSet;

/** Draws one token after another and remembers the seen ones for the repetition penalty. */
public final class Sampler {
    private final Sampling settings;
    private final RandomNumbers random;
    private final BitSet seen = new BitSet();
    private final boolean penalized;
    private float[] scores = new float[0];

    public Sampler(Sampling settings, int[] prompt) {
        this.settings = settings;
        this.random = new RandomNumbers(settings.seed);
        this.penalized = settings.repetitionPenalty != 1;
        if (penalized) {
            for (int id : prompt) {
                seen.set(id);
            }
        }
    }

    /**
     * The next token.
     *
     * @param logits {@code [vocab]}, not changed
     * @param stage that computed them, for the error message
     * @param position of the token they follow
     * @throws NumericalException a logit is not finite
     */
    public int next(FloatBuffer logits, int stage, int position) throws NumericalException {
        int vocab = logits.capacity();
        if (scores.length != vocab) {
            scores = new float[vocab];
        }
        logits.clear();
        logits.get(scores);
        logits.clear();
        int best = 0;
        for (int i = 0; i < vocab; i++) {
            float score = scores[i];
            if (Float.isNaN(score) || Float.isInfinite(score)) {
                throw new NumericalException(
                    "stage " + stage + " gave logits that are not finite at position " + position);
            }
        }
        if (penalized) {
            float penalty = (float) settings.repetitionPenalty;
            for (int id = seen.nextSetBit(0); id >= 0; id = seen.nextSetBit(id + 1)) {
                scores[id] = scores[id] < 0 ? scores[id] * penalty : scores[id] / penalty;
            }
        }
        for (int i = 1; i < vocab; i++) {
            if (scores[i] > scores[best]) {
                best = i;
            }
        }
        int token = settings.temperature == 0 ? best : draw(best);
        if (penalized) {
            seen.set(token);
        }
        return token;
    }

    private int draw(int best) {
        int vocab = scores.length;
        double[] weights = new double[vocab];
        double total = 0;
        for (int i = 0; i < vocab; i++) {
            // Subtract before dividing: a tiny temperature then underflows to 0 and never overflows.
            weights[i] = Math.exp(((double) scores[i] - scores[best]) / settings.temperature);
            total += weights[i];
        }
        int count = settings.topK == 0 ? vocab : Math.min(settings.topK, vocab);
        if (count == vocab && settings.topP == 1) {
            return drawn(weights, null, vocab, total);
        }
        int[] order = largest(count);
        if (count < vocab) {
            total = 0;
            for (int id : order) {
                total += weights[id];
            }
        }
        int inside = order.length;
        if (settings.topP < 1) {
            double before = 0; // mass of the more likely tokens
            inside = 0;
            while (inside < order.length && before < settings.topP * total) {
                before += weights[order[inside++]];
            }
        }
        double kept = 0;
        for (int i = 0; i < inside; i++) {
            kept += weights[order[i]];
        }
        return drawn(weights, order, inside, kept);
    }

    /** The token that one number draws; {@code order} is null for all tokens in their own order. */
    private int drawn(double[] weights, int[] order, int count, double total) {
        double wanted = random.next();
        double sum = 0;
        int last = 0;
        for (int i = 0; i < count; i++) {
            int id = order == null ? i : order[i];
            double probability = weights[id] / total;
            sum += probability;
            if (sum > wanted) {
                return id;
            }
            if (probability > 0) {
                last = id;
            }
        }
        return last; // the sum is rounded to less than the number
    }

    /** The ids of the largest scores, largest first, of equal ones the least id first. */
    private int[] largest(int count) {
        long[] keys = new long[scores.length];
        for (int i = 0; i < keys.length; i++) {
            int bits = Float.floatToIntBits(scores[i]);
            int ordered = bits < 0 ? ~bits : bits | 0x80000000; // unsigned order of the bits is that of the numbers
            keys[i] = (~ordered & 0xFFFFFFFFL) << 31 | i; // falling scores, rising ids; 63 bits, so never negative
        }
        Arrays.sort(keys);
        int[] result = new int[count];
        for (int i = 0; i < count; i++) {
            result[i] = (int) (keys[i] & 0x7FFFFFFF);
        }
        return result;
    }
}
