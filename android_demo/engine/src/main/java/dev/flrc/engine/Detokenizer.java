package dev.flrc.engine;

import dev.flrc.engine.tokenizer.Tokenizer;
import java.util.ArrayList;
import java.util.List;

/** Token ids to text as they come: decodes from a few tokens back and holds back incomplete characters. */
public final class Detokenizer {
    private static final String REPLACEMENT = "\uFFFD";
    private static final int BACK = 64; // tokens of what is gone on from that are looked at, at most

    private final Tokenizer tokenizer;
    private List<Integer> window = new ArrayList<>();
    private String emitted = ""; // text of the window that is out already
    private int fresh; // ids at the end of the window whose text is not

    /**
     * @param before ids of the text that is gone on from; none where a text of its own begins, as an answer in a chat
     */
    public Detokenizer(Tokenizer tokenizer, int[] before) {
        this.tokenizer = tokenizer;
        // The last ids that have a text, from where no run of bytes is cut.
        for (int i = before.length - 1; i >= Math.max(0, before.length - BACK); i--) {
            window.add(0, before[i]);
            if (!tokenizer.isByte(before[i])) {
                emitted = decode(window);
                if (!emitted.trim().isEmpty()) {
                    return;
                }
            }
        }
    }

    /** The text that is certain after one more token, perhaps none. */
    public String push(int token) {
        if (tokenizer.specialIds().contains(token)) {
            return "";
        }
        window.add(token);
        fresh++;
        // A run of byte tokens decodes as a whole: an invalid byte makes even its valid characters U+FFFD.
        if (tokenizer.isByte(token)) {
            return "";
        }
        String text = decode(window);
        return text.endsWith(REPLACEMENT) ? "" : emit(text);
    }

    /** The text held back; the last piece. */
    public String flush() {
        return fresh == 0 ? "" : emit(decode(window));
    }

    private String emit(String text) {
        String piece = text.length() >= emitted.length() ? text.substring(emitted.length()) : "";
        List<Integer> recent = new ArrayList<>(window.subList(window.size() - fresh, window.size()));
        // A window without text would lose the space that decoders strip from a beginning.
        emitted = decode(recent);
        if (emitted.isEmpty()) {
            emitted = text;
        } else {
            window = recent;
        }
        fresh = 0;
        return piece;
    }

    private String decode(List<Integer> ids) {
        int[] all = new int[ids.size()];
        for (int i = 0; i < all.length; i++) {
            all[i] = ids.get(i);
        }
        return tokenizer.decode(all);
    }
}
