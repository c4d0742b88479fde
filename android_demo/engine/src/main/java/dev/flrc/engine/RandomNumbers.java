package dev.flrc.engine;

/**
 * numpy's {@code default_rng(seed).random()}: PCG64 (O'Neill 2014, XSL-RR 128/64) seeded by numpy's SeedSequence, so that
 * a seed draws the same here as in the Python runtime.
 */
final class RandomNumbers {
    private static final long MULTIPLIER_HIGH = 0x2360ED051FC65DA4L;
    private static final long MULTIPLIER_LOW = 0x4385DF649FCCF645L;
    private static final long MASK = 0xFFFFFFFFL;

    private long high;
    private long low;
    private long incrementHigh;
    private long incrementLow;

    RandomNumbers(long seed) {
        long[] words = seedWords(seed);
        long stateHigh = words[0];
        long stateLow = words[1];
        incrementHigh = words[2] << 1 | words[3] >>> 63;
        incrementLow = words[3] << 1 | 1;
        step();
        addState(stateHigh, stateLow);
        step();
    }

    /** A number from 0 up to and without 1. */
    double next() {
        step();
        long mixed = Long.rotateRight(high ^ low, (int) (high >>> 58));
        return (mixed >>> 11) * 0x1.0p-53;
    }

    private void step() {
        long product = multiplyHigh(low, MULTIPLIER_LOW) + high * MULTIPLIER_LOW + low * MULTIPLIER_HIGH;
        low *= MULTIPLIER_LOW;
        high = product;
        addState(incrementHigh, incrementLow);
    }

    private void addState(long otherHigh, long otherLow) {
        long sum = low + otherLow;
        high += otherHigh + (Long.compareUnsigned(sum, low) < 0 ? 1 : 0);
        low = sum;
    }

    /** The upper half of the unsigned product; Math.multiplyHigh is not on every Android. */
    private static long multiplyHigh(long a, long b) {
        long a0 = a & MASK;
        long a1 = a >>> 32;
        long b0 = b & MASK;
        long b1 = b >>> 32;
        long middle = a1 * b0 + (a0 * b0 >>> 32);
        long carry = a0 * b1 + (middle & MASK);
        return a1 * b1 + (middle >>> 32) + (carry >>> 32);
    }

    /** Four words of 64 bits of numpy's SeedSequence(seed), whose pool has four words of 32 bits. */
    private static long[] seedWords(long seed) {
        int[] entropy = seed >>> 32 == 0 ? new int[] {(int) seed} : new int[] {(int) seed, (int) (seed >>> 32)};
        int[] pool = new int[4];
        int[] constant = {0x43B0D7E5};
        for (int i = 0; i < pool.length; i++) {
            pool[i] = hash(i < entropy.length ? entropy[i] : 0, constant);
        }
        for (int from = 0; from < pool.length; from++) {
            for (int to = 0; to < pool.length; to++) {
                if (from != to) {
                    pool[to] = mix(pool[to], hash(pool[from], constant));
                }
            }
        }
        int[] words = new int[8];
        int hashed = 0x8B51F9DD;
        for (int i = 0; i < words.length; i++) {
            int value = pool[i % pool.length] ^ hashed;
            hashed *= 0x58F38DED;
            value *= hashed;
            words[i] = value ^ value >>> 16;
        }
        long[] result = new long[4];
        for (int i = 0; i < 4; i++) {
            result[i] = words[2 * i] & MASK | (words[2 * i + 1] & MASK) << 32;
        }
        return result;
    }

    private static int hash(int value, int[] constant) {
        int mixed = value ^ constant[0];
        constant[0] *= 0x931E8875;
        mixed *= constant[0];
        return mixed ^ mixed >>> 16;
    }

    private static int mix(int x, int y) {
        int result = 0xCA01F9DD * x - 0x4973F715 * y;
        return result ^ result >>> 16;
    }
}
