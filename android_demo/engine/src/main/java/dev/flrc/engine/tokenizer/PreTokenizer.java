package dev.flrc.engine.tokenizer;

import dev.flrc.engine.FormatException;
import java.util.ArrayList;
import java.util.List;
import java.util.regex.Pattern;

/** Splits a text into the words that are encoded one by one. */
interface PreTokenizer {
    /** GPT-2's words: contractions, letters, numbers and signs with a space before them, and spaces. */
    Pattern WORDS = pattern("'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+");
    Pattern DIGIT = pattern("\\p{N}");

    List<Piece> split(List<Piece> pieces);

    static PreTokenizer of(Object value) throws FormatException {
        if (value == null) {
            return pieces -> pieces;
        }
        Step step = Step.of(value, "pre_tokenizer");
        switch (step.type()) {
            case "Sequence": {
                List<PreTokenizer> all = new ArrayList<>();
                for (Object part : step.fields.list("pretokenizers")) {
                    all.add(of(part));
                }
                return pieces -> {
                    List<Piece> result = pieces;
                    for (PreTokenizer one : all) {
                        result = one.split(result);
                    }
                    return result;
                };
            }
            case "Digits": {
                boolean one = step.fields.flag("individual_digits", false);
                return new Splitter(DIGIT, one ? Splitter.Behavior.ISOLATED : Splitter.Behavior.CONTIGUOUS);
            }
            case "ByteLevel": {
                boolean prefix = step.fields.flag("add_prefix_space", true);
                boolean regex = step.fields.flag("use_regex", true);
                PreTokenizer words = regex ? new Splitter(WORDS, Splitter.Behavior.ISOLATED) : all -> all;
                return pieces -> {
                    List<Piece> result = new ArrayList<>();
                    for (Piece word : words.split(prefix ? prefixed(pieces) : pieces)) {
                        result.add(word.map(ByteAlphabet::encode));
                    }
                    return result;
                };
            }
            case "Metaspace":
                return new Metaspace(step)::split;
            case "Split": {
                String plain = step.plainPattern();
                Pattern pattern = plain == null ? SplitPattern.of(step.regexPattern())
                    : Pattern.compile(Pattern.quote(plain));
                return new Splitter(pattern, behavior(step), step.fields.flag("invert", false));
            }
            default:
                throw step.unknown();
        }
    }

    static Splitter.Behavior behavior(Step step) throws FormatException {
        switch (step.fields.text("behavior")) {
            case "Isolated":
                return Splitter.Behavior.ISOLATED;
            case "Removed":
                return Splitter.Behavior.REMOVED;
            case "Contiguous":
                return Splitter.Behavior.CONTIGUOUS;
            case "MergedWithPrevious":
                return Splitter.Behavior.MERGED_WITH_PREVIOUS;
            case "MergedWithNext":
                return Splitter.Behavior.MERGED_WITH_NEXT;
            default:
                throw step.unknown();
        }
    }

    /** A pattern whose classes are Unicode's, as on Android, where they always are. */
    static Pattern pattern(String regex) {
        return Pattern.compile(regex, Pattern.UNICODE_CHARACTER_CLASS);
    }

    static List<Piece> prefixed(List<Piece> pieces) {
        List<Piece> result = new ArrayList<>();
        for (Piece piece : pieces) {
            result.add(piece.text.startsWith(" ") ? piece : piece.prepend(" "));
        }
        return result;
    }
}
