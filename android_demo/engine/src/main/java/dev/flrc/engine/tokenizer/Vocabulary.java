package dev.flrc.engine.tokenizer;

import java.util.HashMap;
import java.util.Map;

/** Tokens by id and ids by token. */
final class Vocabulary {
    private final Map<String, Integer> ids = new HashMap<>();
    private String[] tokens = new String[1024];
    private int size;

    void put(String token, int id) {
        if (id >= tokens.length) {
            tokens = java.util.Arrays.copyOf(tokens, Math.max(id + 1, tokens.length * 2));
        }
        ids.put(token, id);
        tokens[id] = token;
        size = Math.max(size, id + 1);
    }

    /** The id of a token, or -1. */
    int id(String token) {
        Integer id = ids.get(token);
        return id == null ? -1 : id;
    }

    /** The token of an id, or null. */
    String token(int id) {
        return id < 0 || id >= size ? null : tokens[id];
    }

    /** The number of tokens: ids may have gaps. */
    int count() {
        return ids.size();
    }
}
