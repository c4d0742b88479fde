package dev.flrc.engine.tokenizer;

import dev.flrc.engine.Fields;
import dev.flrc.engine.FormatException;

/** A token that is found in the text itself, and how. */
final class AddedToken {
    final String content;
    final boolean special; // decoding passes it over
    final boolean normalized; // it is found in the normalized text, being normalized as well
    private final boolean singleWord; // only where no word goes on beside it
    private final boolean leftSpace; // it takes the white space before it
    private final boolean rightSpace;

    AddedToken(Fields step) throws FormatException {
        content = step.text("content");
        special = step.flag("special", false);
        normalized = step.flag("normalized", false);
        singleWord = step.flag("single_word", false);
        leftSpace = step.flag("lstrip", false);
        rightSpace = step.flag("rstrip", false);
    }

    boolean allowed(String text, int start, int end) {
        return !singleWord
            || (start == 0 || !Characters.isWord(text.codePointBefore(start)))
            && (end == text.length() || !Characters.isWord(text.codePointAt(end)));
    }

    int start(String text, int start) {
        return leftSpace ? Characters.spacesBefore(text, start) : start;
    }

    int end(String text, int end) {
        return rightSpace ? Characters.spacesBehind(text, end) : end;
    }
}
