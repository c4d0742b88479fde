package dev.flrc.engine.tokenizer;

/** Kinds of characters as Unicode's and Rust's regular expressions have them: \s and \w. */
final class Characters {
    private Characters() {
    }

    /** White_Space; Java's own methods leave out some of it or take in separators of files. */
    static boolean isSpace(int c) {
        return Character.isSpaceChar(c) || c >= '\t' && c <= '\r' || c == 0x85;
    }

    static boolean isWord(int c) {
        switch (Character.getType(c)) {
            case Character.NON_SPACING_MARK:
            case Character.ENCLOSING_MARK:
            case Character.COMBINING_SPACING_MARK:
            case Character.DECIMAL_DIGIT_NUMBER:
            case Character.CONNECTOR_PUNCTUATION:
                return true;
            default:
                return Character.isAlphabetic(c) || c == 0x200C || c == 0x200D; // the joiners
        }
    }

    /** Where the white space that ends at a place begins. */
    static int spacesBefore(String text, int end) {
        int start = end;
        while (start > 0 && isSpace(text.charAt(start - 1))) {
            start--;
        }
        return start;
    }

    /** Where the white space that begins at a place ends. */
    static int spacesBehind(String text, int start) {
        int end = start;
        while (end < text.length() && isSpace(text.charAt(end))) {
            end++;
        }
        return end;
    }
}
