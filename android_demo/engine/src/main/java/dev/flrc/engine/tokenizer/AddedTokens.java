package dev.flrc.engine.tokenizer;

import dev.flrc.engine.Fields;
import dev.flrc.engine.FormatException;
import java.util.HashMap;
import java.util.HashSet;
import java.util.Map;
import java.util.Set;

/** Tokens that are found in a text before anything else is done to it: the leftmost, of those the longest. */
final class AddedTokens {
    /** A node of the tree of all tokens. */
    private static final class Node {
        final Map<Character, Node> next = new HashMap<>();
        int id = -1;
    }

    private final Node root = new Node();
    private final Set<Integer> special = new HashSet<>();

    void add(Fields step, Vocabulary vocabulary) throws FormatException {
        String content = step.text("content");
        int id = step.count("id", 0);
        for (String name : new String[] {"single_word", "lstrip", "rstrip", "normalized"}) {
            if (step.flag(name, false)) {
                throw new FormatException("tokenizer.json: " + name + " of the token " + content + " is not handled");
            }
        }
        vocabulary.put(content, id);
        if (step.flag("special", false)) {
            special.add(id);
        }
        if (content.isEmpty()) {
            return;
        }
        Node node = root;
        for (int i = 0; i < content.length(); i++) {
            node = node.next.computeIfAbsent(content.charAt(i), c -> new Node());
        }
        node.id = id;
    }

    boolean isSpecial(int id) {
        return special.contains(id);
    }

    Set<Integer> special() {
        return special;
    }

    /** A token that was found; {@code id} is -1 at the end of the text. */
    static final class Match {
        final int start;
        final int end;
        final int id;

        Match(int start, int end, int id) {
            this.start = start;
            this.end = end;
            this.id = id;
        }
    }

    /** The first token at or behind a place. */
    Match find(String text, int from) {
        for (int start = from; start < text.length(); start++) {
            Node node = root;
            Match longest = null;
            for (int i = start; i < text.length(); i++) {
                node = node.next.get(text.charAt(i));
                if (node == null) {
                    break;
                }
                if (node.id >= 0) {
                    longest = new Match(start, i + 1, node.id);
                }
            }
            if (longest != null) {
                return longest;
            }
        }
        return new Match(text.length(), text.length(), -1);
    }
}
