package dev.flrc.engine.tokenizer;

import dev.flrc.engine.Fields;
import dev.flrc.engine.FormatException;
import java.util.HashMap;
import java.util.HashSet;
import java.util.Map;
import java.util.Set;

/**
 * The tokens beside the model's vocabulary: some are found in the text as it is, the others once it is normalized.
 *
 * <p>Ids are given as the tokenizers library gives them: the vocabulary's own, else the next behind the vocabulary,
 * whatever the file says.
 */
final class AddedTokens {
    /** Finds tokens in the text as it is. */
    final TokenFinder raw = new TokenFinder();
    /** Finds tokens in the normalized text. */
    final TokenFinder normalized = new TokenFinder();

    private final Map<String, Integer> ids = new HashMap<>();
    private final Map<Integer, AddedToken> tokens = new HashMap<>();
    private final Map<Integer, String> written = new HashMap<>(); // for the decoder, which undoes what was normalized
    private final Set<String> special = new HashSet<>();
    private final Set<Integer> specialIds = new HashSet<>();

    AddedTokens(Iterable<?> list, Vocabulary vocabulary, Normalizer normalizer) throws FormatException {
        int next = vocabulary.count();
        for (Object value : list) {
            Fields step = Fields.of(value, "tokenizer.json: added_tokens");
            step.count("id", 0);
            AddedToken token = new AddedToken(step);
            if (token.content.isEmpty()) {
                continue;
            }
            int id = id(token.content) < 0 ? vocabulary.id(token.content) : id(token.content);
            if (id < 0) {
                id = next++;
            }
            ids.put(token.content, id);
            tokens.put(id, token);
            if (token.normalized) {
                written.put(id, normalizer.apply(Piece.whole(token.content)).text);
            }
            if (token.special) {
                special.add(token.content);
            }
        }
        for (Map.Entry<Integer, AddedToken> entry : tokens.entrySet()) {
            AddedToken token = entry.getValue();
            String text = token.normalized ? written.get(entry.getKey()) : token.content;
            if (text.isEmpty()) { // the tokenizers library splits the text anywhere
                throw new FormatException("tokenizer.json: the added token '" + token.content
                    + "' is empty once normalized, which is not handled");
            }
            int before = (token.normalized ? normalized : raw).add(text, entry.getKey(), token);
            if (token.special) {
                specialIds.add(entry.getKey());
            }
            if (before >= 0) { // the tokenizers library takes one by chance
                throw new FormatException("tokenizer.json: the added tokens '" + tokens.get(before).content + "' and '"
                    + token.content + "' are the same once normalized, which is not handled");
            }
        }
    }

    /** The id of a token, or -1. */
    int id(String content) {
        Integer id = ids.get(content);
        return id == null ? -1 : id;
    }

    /** What a decoder gets for an id, or null. */
    String token(int id) {
        AddedToken token = tokens.get(id);
        return token == null ? null : written.getOrDefault(id, token.content);
    }

    /** Whether decoding passes over what a decoder would get. */
    boolean isSpecial(String token) {
        return special.contains(token);
    }

    /** Ids of special tokens. */
    Set<Integer> specialIds() {
        return specialIds;
    }
}
