package dev.flrc.engine.tokenizer;

import dev.flrc.engine.FormatException;
import java.util.ArrayList;
import java.util.List;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.regex.PatternSyntaxException;

/** Splits a text into the words that are encoded one by one. */
interface PreTokenizer {
    /** GPT-2's words: contractions, letters, numbers and signs with a space before them, and spaces. */
    Pattern WORDS = pattern("'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+");
    Pattern DIGIT = pattern("\\p{N}");

    List<String> split(List<String> words);

    static PreTokenizer of(Object value) throws FormatException {
        if (value == null) {
            return words -> words;
        }
        Step step = Step.of(value, "pre_tokenizer");
        switch (step.type()) {
            case "Sequence": {
                List<PreTokenizer> all = new ArrayList<>();
                for (Object part : step.fields.list("pretokenizers")) {
                    all.add(of(part));
                }
                return words -> {
                    List<String> result = words;
                    for (PreTokenizer one : all) {
                        result = one.split(result);
                    }
                    return result;
                };
            }
            case "Digits":
                if (!step.fields.flag("individual_digits", false)) {
                    return isolate(pattern("\\p{N}+"));
                }
                return isolate(DIGIT);
            case "ByteLevel": {
                boolean prefix = step.fields.flag("add_prefix_space", true);
                boolean regex = step.fields.flag("use_regex", true);
                PreTokenizer words = regex ? isolate(WORDS) : all -> all;
                return all -> {
                    List<String> result = new ArrayList<>();
                    for (String word : words.split(prefix ? prefixed(all) : all)) {
                        result.add(ByteAlphabet.encode(word));
                    }
                    return result;
                };
            }
            case "Split": {
                String plain = step.plainPattern();
                Pattern pattern = plain == null ? regex(step) : Pattern.compile(Pattern.quote(plain));
                String behavior = step.fields.text("behavior");
                if (step.fields.flag("invert", false)) {
                    throw step.unknown();
                }
                if (behavior.equals("Isolated")) {
                    return isolate(pattern);
                }
                if (behavior.equals("MergedWithPrevious")) {
                    return words -> mergedWithPrevious(words, pattern);
                }
                throw step.unknown();
            }
            default:
                throw step.unknown();
        }
    }

    /** A pattern whose classes are Unicode's, as on Android, where they always are. */
    static Pattern pattern(String regex) {
        return Pattern.compile(regex, Pattern.UNICODE_CHARACTER_CLASS);
    }

    static Pattern regex(Step step) throws FormatException {
        String regex = step.regexPattern();
        try {
            // (?i:…) folds beyond ASCII in the tokenizers library, which needs a flag of its own here
            return Pattern.compile(regex, Pattern.UNICODE_CHARACTER_CLASS | Pattern.UNICODE_CASE);
        } catch (PatternSyntaxException e) {
            throw new FormatException("tokenizer.json: the pattern " + regex + " cannot be read: " + e.getDescription());
        }
    }

    static List<String> prefixed(List<String> words) {
        List<String> result = new ArrayList<>();
        for (String word : words) {
            result.add(word.startsWith(" ") ? word : " " + word);
        }
        return result;
    }

    /** Makes a word of every match and of every piece between two. */
    static PreTokenizer isolate(Pattern pattern) {
        return words -> {
            List<String> result = new ArrayList<>();
            for (String word : words) {
                int end = 0;
                Matcher matcher = pattern.matcher(word);
                while (matcher.find()) {
                    add(result, word, end, matcher.start());
                    add(result, word, matcher.start(), matcher.end());
                    end = matcher.end();
                }
                add(result, word, end, word.length());
            }
            return result;
        };
    }

    static List<String> mergedWithPrevious(List<String> words, Pattern pattern) {
        List<String> result = new ArrayList<>();
        for (String word : words) {
            int end = 0;
            Matcher matcher = pattern.matcher(word);
            while (matcher.find()) {
                add(result, word, end, matcher.end());
                end = matcher.end();
            }
            add(result, word, end, word.length());
        }
        return result;
    }

    static void add(List<String> result, String word, int start, int end) {
        if (end > start) {
            result.add(word.substring(start, end));
        }
    }
}
