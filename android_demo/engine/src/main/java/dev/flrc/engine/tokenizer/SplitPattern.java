package dev.flrc.engine.tokenizer;

import dev.flrc.engine.FormatException;
import java.util.regex.Pattern;
import java.util.regex.PatternSyntaxException;

/**
 * A regular expression of the tokenizers library (Oniguruma's Ruby syntax) for Java and Android (ICU).
 *
 * <p>What these three read alike is compiled as it is: sets, categories such as {@code \p{Lu}}, groups, looks ahead and
 * back, greedy, lazy and possessive quantifiers; {@code $}, in Ruby the end of a line, is written out. What else one of
 * them reads in another way is refused: {@code ^}, {@code .} and {@code \w}, flags but {@code (?i:)}, {@code {2}+},
 * references, sets such as {@code [[:alpha:]]} and {@code &&}.
 */
final class SplitPattern {
    private final String regex;
    private final StringBuilder compiled = new StringBuilder();
    private int at;
    private int copied; // so far the regex is compiled
    private int depth; // of groups
    private int insensitive; // the depth at which (?i: was opened, 0: it is not open

    private SplitPattern(String regex) {
        this.regex = regex;
    }

    static Pattern of(String regex) throws FormatException {
        try {
            String compiled = new SplitPattern(regex).compile();
            // (?i:…) folds beyond ASCII in the tokenizers library, which needs a flag of its own here
            return Pattern.compile(compiled, Pattern.UNICODE_CHARACTER_CLASS | Pattern.UNICODE_CASE);
        } catch (PatternSyntaxException e) {
            throw new FormatException("tokenizer.json: the pattern " + regex + " cannot be read: "
                + e.getDescription());
        }
    }

    private String compile() {
        while (at < regex.length()) {
            char c = regex.charAt(at++);
            switch (c) {
                case '\\':
                    escape();
                    break;
                case '[':
                    set();
                    break;
                case '(':
                    group();
                    break;
                case ')':
                    insensitive = insensitive == depth ? 0 : insensitive;
                    depth--;
                    break;
                case '}': // escapes with braces are behind us
                    if (next("+") || next("?")) {
                        throw refused("}" + regex.charAt(at));
                    }
                    break;
                case '$':
                    compiled.append(regex, copied, at - 1).append("(?=\\n|\\z)");
                    copied = at;
                    break;
                case '^':
                case '.':
                    throw refused(String.valueOf(c));
                default:
            }
        }
        return compiled.append(regex, copied, at).toString();
    }

    private void group() {
        depth++;
        if (!next("?")) {
            return;
        }
        if (next("?i:")) {
            insensitive = insensitive == 0 ? depth : insensitive;
        } else if (!next("?:") && !next("?=") && !next("?!") && !next("?<=") && !next("?<!") && !next("?>")) {
            throw refused("(?");
        }
    }

    /** Goes to the end of a set; sets may hold sets. */
    private void set() {
        for (int open = 1; open > 0 && at < regex.length(); ) {
            if (next("[:") || next("&&") || next("--")) {
                throw refused(regex.substring(at, at + 2));
            }
            char c = regex.charAt(at++);
            open += c == '[' ? 1 : c == ']' ? -1 : 0;
            if (c == '\\') {
                escape();
            }
        }
    }

    private void escape() {
        char c = at < regex.length() ? regex.charAt(at++) : '\\';
        if (c == 'p' || c == 'P') {
            int end = regex.indexOf('}', at);
            // Without regard to case, Java takes a category of letters for all letters.
            if (insensitive > 0 || end < 0 || !regex.substring(at, end).matches("\\{[A-Z][a-z]?")) {
                throw refused("\\" + c);
            }
            at = end + 1;
        } else if ("sSdDrntfu".indexOf(c) < 0 && (Character.isLetterOrDigit(c) || c > 0x7F)) {
            throw refused("\\" + c);
        }
    }

    private boolean next(String text) {
        return regex.startsWith(text, at);
    }

    private PatternSyntaxException refused(String what) {
        return new PatternSyntaxException(what + " is not handled", regex, at);
    }
}
