package dev.flrc.engine.tokenizer;

import java.nio.charset.StandardCharsets;
import java.util.PriorityQueue;

/** Byte-pair encoding of one word: the merge of least rank first, of equal ones the leftmost. */
final class Bpe {
    final Vocabulary vocabulary;
    private final Merges merges;
    private final int unknown; // -1: none
    private final boolean fuseUnknown;
    private final boolean byteFallback;
    private final boolean ignoreMerges;
    private final int[] byteIds = new int[256];

    Bpe(Vocabulary vocabulary, Merges merges, int unknown, boolean fuseUnknown, boolean byteFallback,
        boolean ignoreMerges) {
        this.vocabulary = vocabulary;
        this.merges = merges;
        this.unknown = unknown;
        this.fuseUnknown = fuseUnknown;
        this.byteFallback = byteFallback;
        this.ignoreMerges = ignoreMerges;
        for (int b = 0; b < 256; b++) {
            byteIds[b] = vocabulary.id(String.format("<0x%02X>", b));
        }
    }

    void encode(String word, Ids out) {
        if (word.isEmpty()) {
            return;
        }
        if (ignoreMerges) {
            int whole = vocabulary.id(word);
            if (whole >= 0) {
                out.add(whole);
                return;
            }
        }
        int[] symbols = symbols(word);
        merge(symbols, out);
    }

    private int[] symbols(String word) {
        Ids found = new Ids();
        boolean pending = false; // an unknown one, which comes before the next character that is in the vocabulary
        for (int i = 0; i < word.length(); ) {
            int next = word.offsetByCodePoints(i, 1);
            String character = word.substring(i, next);
            i = next;
            int id = vocabulary.id(character);
            if (id < 0 && byteFallback && addBytes(character, found)) {
                continue;
            }
            if (pending && (id >= 0 || !fuseUnknown)) {
                found.add(unknown);
                pending = false;
            }
            if (id >= 0) {
                found.add(id);
            } else {
                pending = unknown >= 0;
            }
        }
        if (pending) {
            found.add(unknown);
        }
        return found.toArray();
    }

    private boolean addBytes(String character, Ids found) {
        byte[] bytes = character.getBytes(StandardCharsets.UTF_8);
        for (byte b : bytes) {
            if (byteIds[b & 0xFF] < 0) {
                return false;
            }
        }
        for (byte b : bytes) {
            found.add(byteIds[b & 0xFF]);
        }
        return true;
    }

    /** A pair that may be merged, as it was when it was found. */
    private static final class Candidate implements Comparable<Candidate> {
        final int rank;
        final int position;
        final int made;

        Candidate(int rank, int position, int made) {
            this.rank = rank;
            this.position = position;
            this.made = made;
        }

        @Override
        public int compareTo(Candidate other) {
            return rank != other.rank ? Integer.compare(rank, other.rank) : Integer.compare(position, other.position);
        }
    }

    private void merge(int[] ids, Ids out) {
        int n = ids.length;
        int[] next = new int[n];
        int[] previous = new int[n];
        PriorityQueue<Candidate> queue = new PriorityQueue<>(Math.max(1, n));
        for (int i = 0; i < n; i++) {
            next[i] = i + 1 < n ? i + 1 : -1;
            previous[i] = i - 1;
        }
        for (int i = 0; i + 1 < n; i++) {
            offer(queue, ids, i, i + 1);
        }
        while (!queue.isEmpty()) {
            Candidate best = queue.poll();
            int left = best.position;
            int right = next[left];
            if (ids[left] < 0 || right < 0 || ids[right] < 0) {
                continue;
            }
            int place = merges.find(ids[left], ids[right]);
            if (place < 0 || merges.made(place) != best.made) {
                continue; // one of the two has been merged since
            }
            ids[left] = best.made;
            ids[right] = -1;
            next[left] = next[right];
            if (next[right] >= 0) {
                previous[next[right]] = left;
                offer(queue, ids, left, next[left]);
            }
            if (previous[left] >= 0) {
                offer(queue, ids, previous[left], left);
            }
        }
        for (int i = 0; i >= 0 && i < n; i = next[i]) {
            out.add(ids[i]);
        }
    }

    private void offer(PriorityQueue<Candidate> queue, int[] ids, int left, int right) {
        int place = merges.find(ids[left], ids[right]);
        if (place >= 0) {
            queue.add(new Candidate(merges.rank(place), left, merges.made(place)));
        }
    }
}
