package dev.flrc.engine.tokenizer;

import dev.flrc.engine.FormatException;
import dev.flrc.engine.JsonReader;
import java.util.ArrayList;
import java.util.List;

/** Reads {@code model} of {@code tokenizer.json}; vocabulary and merges go into tables as they come. */
final class BpeReader {
    private static final int MOST = 1 << 22; // ids and merges: more are an attack

    private BpeReader() {
    }

    static Bpe read(JsonReader in) throws FormatException {
        Vocabulary vocabulary = new Vocabulary();
        List<String> pairs = new ArrayList<>(); // left and right in turn
        String unknown = null;
        boolean fuse = false;
        boolean fallback = false;
        boolean ignore = false;
        in.beginObject();
        for (String name = in.name(); name != null; name = in.name()) {
            switch (name) {
                case "type": {
                    String type = in.string();
                    if (!type.equals("BPE")) {
                        throw in.error("a tokenizer of type " + type + " is not handled, only BPE");
                    }
                    break;
                }
                case "vocab":
                    readVocabulary(in, vocabulary);
                    break;
                case "merges":
                    readMerges(in, pairs);
                    break;
                case "unk_token": {
                    Object value = in.value();
                    unknown = value instanceof String ? (String) value : null;
                    break;
                }
                case "fuse_unk":
                    fuse = in.bool();
                    break;
                case "byte_fallback":
                    fallback = in.bool();
                    break;
                case "ignore_merges":
                    ignore = in.bool();
                    break;
                default: { // dropout, continuing_subword_prefix, end_of_word_suffix
                    Object value = in.value();
                    if (value != null && !"".equals(value)) {
                        throw in.error("model." + name + " is set, which is not handled");
                    }
                }
            }
        }
        Merges merges = new Merges();
        for (int i = 0; i < pairs.size(); i += 2) {
            String left = pairs.get(i);
            String right = pairs.get(i + 1);
            int leftId = vocabulary.id(left);
            int rightId = vocabulary.id(right);
            int made = vocabulary.id(left + right);
            if (leftId < 0 || rightId < 0 || made < 0) {
                throw in.error("the merge of " + left + " and " + right + " is not in the vocabulary");
            }
            merges.put(leftId, rightId, i / 2, made);
        }
        int unknownId = unknown == null ? -1 : vocabulary.id(unknown);
        return new Bpe(vocabulary, merges, unknownId, fuse, fallback, ignore);
    }

    private static void readVocabulary(JsonReader in, Vocabulary vocabulary) throws FormatException {
        in.beginObject();
        for (String token = in.name(); token != null; token = in.name()) {
            int id = in.integer();
            if (id < 0 || id >= MOST) {
                throw in.error("the id " + id + " is out of range");
            }
            vocabulary.put(token, id);
        }
    }

    private static void readMerges(JsonReader in, List<String> pairs) throws FormatException {
        in.beginArray();
        while (in.more()) {
            if (in.peek() == '[') {
                in.beginArray();
                int count = 0;
                while (in.more()) {
                    pairs.add(in.string());
                    count++;
                }
                if (count != 2) {
                    throw in.error("a merge has " + count + " parts");
                }
            } else { // as older files have it: "left right"
                String[] parts = in.string().split(" ", -1);
                if (parts.length != 2) {
                    throw in.error("a merge has " + parts.length + " parts");
                }
                pairs.add(parts[0]);
                pairs.add(parts[1]);
            }
            if (pairs.size() > 2 * MOST) {
                throw in.error("it has too many merges");
            }
        }
    }
}
