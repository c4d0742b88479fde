package dev.flrc.engine.tokenizer;

import dev.flrc.engine.FormatException;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.regex.Pattern;

/** Writes spaces as a visible character, and one before the text or before every piece; as a decoder, undoes it. */
final class Metaspace {
    private static final List<String> SCHEMES = Arrays.asList("always", "first", "never");

    private final String replacement;
    private final String scheme;
    private final Splitter words; // null: a piece stays whole

    Metaspace(Step step) throws FormatException {
        replacement = step.fields.text("replacement");
        scheme = step.fields.has("prepend_scheme") ? step.fields.text("prepend_scheme") : "always";
        boolean prefix = step.fields.flag("add_prefix_space", true); // of older files
        boolean split = step.fields.flag("split", true);
        if (replacement.codePointCount(0, replacement.length()) != 1 || !SCHEMES.contains(scheme)
            || !prefix && !scheme.equals("never")) {
            throw step.unknown();
        }
        words = split ? new Splitter(Pattern.compile(Pattern.quote(replacement)), Splitter.Behavior.MERGED_WITH_NEXT)
            : null;
    }

    List<Piece> split(List<Piece> pieces) {
        List<Piece> result = new ArrayList<>();
        for (Piece piece : pieces) {
            Piece written = piece.replace(" ", replacement);
            boolean prepend = scheme.equals("always") || scheme.equals("first") && piece.beginsText();
            result.add(prepend && !written.text.startsWith(replacement) ? written.prepend(replacement) : written);
        }
        return words == null ? result : words.split(result);
    }

    /** Of the first token every such character goes, not only the one that was put there, as in the library. */
    List<String> decode(List<String> tokens) {
        List<String> result = new ArrayList<>();
        for (String token : tokens) {
            boolean first = result.isEmpty() && !scheme.equals("never");
            result.add(token.replace(replacement, first ? "" : " "));
        }
        return result;
    }
}
