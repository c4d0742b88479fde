package dev.flrc.engine.tokenizer;

import java.util.function.UnaryOperator;

/** A piece of a text on its way to words; it knows whether it begins the text, which Metaspace asks. */
final class Piece {
    final String text;
    private final int lead; // of its characters, so many stand for the first one of the text; behind it none do

    private Piece(String text, int lead) {
        this.text = text;
        this.lead = lead;
    }

    static Piece whole(String text) {
        return new Piece(text, text.isEmpty() ? 0 : text.offsetByCodePoints(0, 1));
    }

    boolean beginsText() {
        return lead > 0;
    }

    Piece part(int start, int end) {
        return new Piece(text.substring(start, end), Math.max(0, Math.min(lead, end) - start));
    }

    Piece prepend(String prefix) {
        return text.isEmpty() ? this : new Piece(prefix + text, lead > 0 ? prefix.length() + lead : 0);
    }

    /** What takes the place of several characters stands for the last of them, as in the tokenizers library. */
    Piece replace(String pattern, String content) {
        StringBuilder changed = new StringBuilder();
        int changedLead = 0;
        int end = 0;
        for (int at = text.indexOf(pattern); at >= 0; at = text.indexOf(pattern, end)) {
            changed.append(text, end, at).append(content);
            changedLead += Math.max(0, Math.min(lead, at) - end);
            end = at + pattern.length();
            changedLead += end <= lead ? content.length() : 0;
        }
        changed.append(text, end, text.length());
        return new Piece(changed.toString(), changedLead + Math.max(0, lead - end));
    }

    /** Changes the text by something that goes from its beginning to its end, such as a normal form. */
    Piece map(UnaryOperator<String> change) {
        String changed = change.apply(text);
        if (lead == 0 || changed.isEmpty()) {
            return new Piece(changed, 0);
        }
        String start = change.apply(text.substring(0, lead));
        // Where what follows is composed with the first character, one character stands for both.
        return new Piece(changed, changed.startsWith(start) ? start.length() : changed.offsetByCodePoints(0, 1));
    }
}
