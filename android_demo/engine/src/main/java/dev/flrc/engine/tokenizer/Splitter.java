package dev.flrc.engine.tokenizer;

import java.util.ArrayList;
import java.util.List;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/** Splits pieces at the matches of a pattern. */
final class Splitter implements PreTokenizer {
    /** What becomes of the matches. */
    enum Behavior {
        ISOLATED, REMOVED, CONTIGUOUS, MERGED_WITH_PREVIOUS, MERGED_WITH_NEXT
    }

    private final Pattern pattern;
    private final Behavior behavior;
    private final boolean invert; // what is between the matches counts as the matches

    Splitter(Pattern pattern, Behavior behavior) {
        this(pattern, behavior, false);
    }

    Splitter(Pattern pattern, Behavior behavior, boolean invert) {
        this.pattern = pattern;
        this.behavior = behavior;
        this.invert = invert;
    }

    /** A match, or what is between two. */
    private static final class Range {
        final int start;
        final int end;
        final boolean match;

        Range(int start, int end, boolean match) {
            this.start = start;
            this.end = end;
            this.match = match;
        }
    }

    @Override
    public List<Piece> split(List<Piece> pieces) {
        List<Piece> result = new ArrayList<>();
        for (Piece piece : pieces) {
            List<Range> ranges = ranges(piece.text);
            int start = 0;
            for (int i = 0; i < ranges.size(); i++) {
                Range range = ranges.get(i);
                if (i + 1 < ranges.size() && joined(ranges, i)) {
                    continue;
                }
                boolean dropped = behavior == Behavior.REMOVED && range.match;
                if (range.end > start && !dropped) {
                    result.add(piece.part(start, range.end));
                }
                start = range.end;
            }
        }
        return result;
    }

    private List<Range> ranges(String text) {
        List<Range> ranges = new ArrayList<>();
        Matcher matcher = pattern.matcher(text);
        int end = 0;
        for (boolean found = matcher.find(); found; found = next(matcher, text)) {
            boolean empty = matcher.start() == matcher.end();
            if (empty && !ranges.isEmpty() && matcher.end() == end) {
                continue; // right behind a match an empty one is none
            }
            if (matcher.start() > end) {
                ranges.add(new Range(end, matcher.start(), invert));
            }
            ranges.add(new Range(matcher.start(), matcher.end(), !invert));
            end = matcher.end();
        }
        if (end < text.length()) {
            ranges.add(new Range(end, text.length(), invert));
        }
        return ranges;
    }

    /** Goes on behind a match; behind an empty one never to the middle of a character, as Java itself does. */
    private static boolean next(Matcher matcher, String text) {
        int end = matcher.end();
        if (matcher.start() == end && end < text.length() && Character.isHighSurrogate(text.charAt(end))) {
            return matcher.find(text.offsetByCodePoints(end, 1));
        }
        return matcher.find();
    }

    /** Whether a range and the next one are one piece. */
    private boolean joined(List<Range> ranges, int i) {
        boolean match = ranges.get(i).match;
        boolean next = ranges.get(i + 1).match;
        switch (behavior) {
            case CONTIGUOUS:
                return match == next;
            case MERGED_WITH_PREVIOUS:
                return !match && next;
            case MERGED_WITH_NEXT:
                return match && !next;
            default:
                return false;
        }
    }
}
