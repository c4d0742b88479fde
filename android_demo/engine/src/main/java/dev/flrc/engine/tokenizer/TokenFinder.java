package dev.flrc.engine.tokenizer;

import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

/** Finds added tokens in a text, the leftmost first, of those the longest. */
final class TokenFinder {
    /** A node of the tree of all tokens. */
    private static final class Node {
        final Map<Character, Node> next = new HashMap<>();
        AddedToken token;
        int id = -1;
    }

    /** A token that was found, or the text between two, whose id is -1. */
    static final class Part {
        final int id;
        final Piece piece;

        Part(int id, Piece piece) {
            this.id = id;
            this.piece = piece;
        }
    }

    private final Node root = new Node();

    /** Adds a token that is written so; returns the id of one that is written so already, or -1. */
    int add(String written, int id, AddedToken token) {
        Node node = root;
        for (int i = 0; i < written.length(); i++) {
            node = node.next.computeIfAbsent(written.charAt(i), c -> new Node());
        }
        int before = node.id;
        node.id = id;
        node.token = token;
        return before;
    }

    /**
     * Splits a piece at its tokens.
     *
     * <p>What a token swallows is searched for tokens all the same; a place that its neighbours forbid is passed over
     * whole. Both as in the tokenizers library.
     */
    List<Part> split(Piece piece) {
        String text = piece.text;
        List<Part> parts = new ArrayList<>();
        int done = 0;
        for (int at = 0; at < text.length(); ) {
            int end = at;
            Node found = root;
            Node node = root;
            for (int i = at; i < text.length() && node != null; i++) {
                node = node.next.get(text.charAt(i));
                if (node != null && node.id >= 0) {
                    found = node;
                    end = i + 1;
                }
            }
            if (found == root) {
                at++;
                continue;
            }
            if (found.token.allowed(text, at, end)) {
                int start = found.token.start(text, at);
                if (done < start) {
                    parts.add(new Part(-1, piece.part(done, start)));
                }
                parts.add(new Part(found.id, null));
                done = found.token.end(text, end);
            }
            at = end;
        }
        if (done < text.length()) {
            parts.add(new Part(-1, piece.part(done, text.length())));
        }
        return parts;
    }
}
