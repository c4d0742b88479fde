package dev.flrc.engine.decode;

import dev.flrc.engine.ChatFrames;
import dev.flrc.engine.ChatFrames.Message;
import dev.flrc.engine.FlrcException;
import dev.flrc.engine.Manifest;
import dev.flrc.engine.Sampling;
import dev.flrc.engine.StagePolicy;
import dev.flrc.engine.tokenizer.Tokenizer;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;

/** Several turns on one KV cache: of a new turn, only what the cache does not hold is read. */
public final class Conversation {
    private final Manifest manifest;
    private final Decoder decoder;
    private final Tokenizer tokenizer;
    private final ChatFrames frames;
    private final List<Message> messages = new ArrayList<>();
    private int[] ids = new int[0]; // of the cache's positions, and perhaps one more
    private int known;
    private int reused;
    private Message question;
    private final StringBuilder said = new StringBuilder();

    /**
     * @param frames of the bundle; null: the model has no chat, and every question begins a text of its own
     */
    public Conversation(Manifest manifest, Decoder decoder, Tokenizer tokenizer, ChatFrames frames) {
        this.manifest = manifest;
        this.decoder = decoder;
        this.tokenizer = tokenizer;
        this.frames = frames;
    }

    /** Prompt tokens of the last question that the cache held already. */
    public int reused() {
        return reused;
    }

    /** Begins again; {@code system} may be null. */
    public void reset(String system) {
        messages.clear();
        question = null;
        if (system != null) {
            messages.add(new Message("system", system));
        }
    }

    /**
     * Says something; the caller takes the answer token by token and reports each with {@link #heard}, and its end with
     * {@link #ended}.
     *
     * @throws FlrcException there is no text, or no room for an answer; the conversation stays as it was
     */
    public Answer ask(String text, Sampling sampling, StagePolicy policy, int maxTokens) throws FlrcException {
        if (text.trim().isEmpty()) {
            throw new FlrcException("the message is empty");
        }
        Message asked = new Message("user", text);
        int[] prompt;
        if (frames == null) {
            prompt = tokenizer.encode(text, true);
        } else {
            List<Message> all = new ArrayList<>(messages);
            all.add(asked);
            prompt = tokenizer.encode(frames.render(all), false);
        }
        // The last token is read again even if it is held: its logits choose the first one of the answer.
        int held = Math.min(decoder.length(), known);
        int common = 0;
        while (common < Math.min(held, prompt.length - 1) && ids[common] == prompt[common]) {
            common++;
        }
        Answer answer = new Answer(manifest, decoder, tokenizer, prompt, frames == null, sampling, policy, maxTokens);
        decoder.rollback(common); // an answer that is refused changes nothing
        reused = common;
        question = asked;
        said.setLength(0);
        ids = Arrays.copyOf(prompt, decoder.context() + 1);
        known = prompt.length;
        return answer;
    }

    /** Remembers a token of the answer. */
    public void heard(Answer.Token token) {
        ids[known++] = token.id;
        said.append(token.text);
    }

    /** Ends an answer, whole or abandoned: what was said of it is the assistant's message. */
    public void ended() {
        if (question != null && said.length() > 0) {
            messages.add(question);
            messages.add(new Message("assistant", said.toString()));
        }
        question = null;
    }
}
