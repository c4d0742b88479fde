package dev.flrc.engine.tokenizer;

/** Pairs of ids -> rank of their merge and the id it makes; a hash table of primitives, for there are half a million. */
final class Merges {
    private long[] keys = new long[1 << 12]; // pair + 1, 0: free
    private int[] ranks = new int[keys.length];
    private int[] made = new int[keys.length];
    private int count;

    void put(int left, int right, int rank, int id) {
        if (2 * ++count > keys.length) {
            grow();
        }
        int place = place(key(left, right));
        if (keys[place] == 0) { // of two equal merges the last one counts, as in a map
            keys[place] = key(left, right);
        }
        ranks[place] = rank;
        made[place] = id;
    }

    /** Where a pair is, or -1. */
    int find(int left, int right) {
        int place = place(key(left, right));
        return keys[place] == 0 ? -1 : place;
    }

    int rank(int place) {
        return ranks[place];
    }

    int made(int place) {
        return made[place];
    }

    private static long key(int left, int right) {
        return ((long) left << 32 | right) + 1;
    }

    private int place(long key) {
        int mask = keys.length - 1;
        long mixed = key * 0x9E3779B97F4A7C15L;
        int place = (int) (mixed >>> 40) & mask;
        while (keys[place] != 0 && keys[place] != key) {
            place = place + 1 & mask;
        }
        return place;
    }

    private void grow() {
        long[] oldKeys = keys;
        int[] oldRanks = ranks;
        int[] oldMade = made;
        keys = new long[2 * oldKeys.length];
        ranks = new int[keys.length];
        made = new int[keys.length];
        for (int i = 0; i < oldKeys.length; i++) {
            if (oldKeys[i] != 0) {
                int place = place(oldKeys[i]);
                keys[place] = oldKeys[i];
                ranks[place] = oldRanks[i];
                made[place] = oldMade[i];
            }
        }
    }
}
