package dev.flrc.engine.decode;

import dev.flrc.engine.Detokenizer;
import dev.flrc.engine.FlrcException;
import dev.flrc.engine.Manifest;
import dev.flrc.engine.Sampler;
import dev.flrc.engine.Sampling;
import dev.flrc.engine.StagePolicy;
import dev.flrc.engine.tokenizer.Tokenizer;
import java.util.Arrays;

/** The tokens of an answer, each computed when it is asked for. */
public final class Answer {
    /** One token and the text that is certain with it, perhaps none. */
    public static final class Token {
        public final int id;
        public final String text;
        /** The stage that computed it. */
        public final int stage;
        /** {@code stop}, {@code length} or null: more tokens follow. */
        public final String finishReason;
        /** Milliseconds it took. */
        public final double milliseconds;

        Token(int id, String text, int stage, String finishReason, double milliseconds) {
            this.id = id;
            this.text = text;
            this.stage = stage;
            this.finishReason = finishReason;
            this.milliseconds = milliseconds;
        }
    }

    private final Decoder decoder;
    private final Sampler sampler;
    private final Detokenizer detokenizer;
    private final StagePolicy policy;
    private final int[] prompt;
    private final int[] ends;
    private final int most;
    private final int stages;
    private int count;
    private int last;
    private int stage;
    private double lastMs;
    private boolean finished;

    /**
     * @param decoder holds the first tokens of the prompt, perhaps none; the rest is read at the first token
     * @param goesOn whether the answer goes on with the text of the prompt, or is a text of its own as in a chat
     * @param maxTokens of the answer; fewer if the context is full before
     */
    public Answer(Manifest manifest, Decoder decoder, Tokenizer tokenizer, int[] prompt, boolean goesOn,
        Sampling sampling, StagePolicy policy, int maxTokens) throws FlrcException {
        if (prompt.length == 0) {
            throw new FlrcException("the prompt holds no token");
        }
        if (prompt.length >= decoder.context()) {
            throw new FlrcException("the prompt has " + prompt.length + " tokens, the context holds "
                + decoder.context(), "shorten it, or begin a new conversation");
        }
        if (maxTokens < 1) {
            throw new FlrcException("max_tokens " + maxTokens + " is not a positive integer");
        }
        for (int id : prompt) {
            if (id < 0 || id >= manifest.vocabSize) {
                throw new FlrcException("the prompt holds a token id outside the vocabulary of " + manifest.vocabSize);
            }
        }
        this.decoder = decoder;
        this.sampler = new Sampler(sampling, prompt);
        this.detokenizer = new Detokenizer(tokenizer, goesOn ? prompt : new int[0]);
        this.policy = policy;
        this.prompt = prompt;
        this.ends = manifest.eosTokenIds;
        this.most = Math.min(maxTokens, decoder.context() - prompt.length);
        this.stages = manifest.stages.size();
    }

    /** The next token, or null after the last. */
    public Token next() throws FlrcException {
        if (finished) {
            return null;
        }
        long begun = System.nanoTime();
        java.nio.FloatBuffer logits;
        if (count == 0) {
            stage = checked(policy.promptStage());
            logits = decoder.prefill(Arrays.copyOfRange(prompt, decoder.length(), prompt.length), stage);
        } else {
            stage = checked(policy.next(count, stage, lastMs));
            logits = decoder.step(last, stage);
        }
        last = sampler.next(logits, stage, decoder.length() - 1);
        boolean end = contains(ends, last);
        String text = end ? "" : detokenizer.push(last);
        count++;
        String reason = end ? "stop" : count == most ? "length" : null;
        if (reason != null) {
            text += detokenizer.flush();
            finished = true;
        }
        double took = (System.nanoTime() - begun) / 1e6;
        lastMs = count > 1 ? took : 0;
        return new Token(last, text, stage, reason, took);
    }

    private int checked(int wanted) throws FlrcException {
        if (wanted < 0 || wanted >= stages) {
            throw new FlrcException("stage " + wanted + " is not one of the bundle's stages 0 to " + (stages - 1));
        }
        return wanted;
    }

    private static boolean contains(int[] values, int value) {
        for (int one : values) {
            if (one == value) {
                return true;
            }
        }
        return false;
    }
}
