package dev.flrc.engine.tokenizer;

import dev.flrc.engine.Fields;
import dev.flrc.engine.FormatException;
import dev.flrc.engine.JsonReader;
import java.io.BufferedInputStream;
import java.io.File;
import java.io.FileInputStream;
import java.io.IOException;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Set;

/**
 * Text to token ids and back, as the {@code tokenizers} library does it with the same {@code tokenizer.json}.
 *
 * <p>Byte-pair encoding with the parts that Llama, Mistral, Gemma, Qwen, SmolLM and the like use; others are refused by
 * name.
 */
public final class Tokenizer {
    /** Bytes that {@code tokenizer.json} may have, as in the Python runtime. */
    public static final long MAX_BYTES = 128L << 20;

    private final Bpe model;
    private final AddedTokens added;
    private final Normalizer normalizer;
    private final PreTokenizer preTokenizer;
    private final TokenDecoder decoder;
    private final int[] before;
    private final int[] after;

    private Tokenizer(Bpe model, AddedTokens added, Normalizer normalizer, PreTokenizer preTokenizer,
        TokenDecoder decoder, int[] before, int[] after) {
        this.model = model;
        this.added = added;
        this.normalizer = normalizer;
        this.preTokenizer = preTokenizer;
        this.decoder = decoder;
        this.before = before;
        this.after = after;
    }

    /**
     * Opens a {@code tokenizer.json}.
     *
     * @throws FormatException it is missing, damaged, too large or of a kind that this engine does not know
     */
    public static Tokenizer open(File file) throws FormatException {
        if (file.length() > MAX_BYTES) {
            throw new FormatException(file.getName() + " is larger than " + MAX_BYTES + " bytes");
        }
        try (JsonReader in = new JsonReader(new BufferedInputStream(new FileInputStream(file)), file.getName())) {
            Tokenizer result = read(in);
            in.end();
            return result;
        } catch (IOException e) {
            throw new FormatException(file.getName() + " cannot be read: " + e.getMessage());
        }
    }

    private static Tokenizer read(JsonReader in) throws FormatException {
        Object normalizer = null;
        Object preTokenizer = null;
        Object decoder = null;
        Object postProcessor = null;
        List<?> addedTokens = Collections.emptyList();
        Bpe model = null;
        in.beginObject();
        for (String name = in.name(); name != null; name = in.name()) {
            switch (name) {
                case "normalizer":
                    normalizer = in.value();
                    break;
                case "pre_tokenizer":
                    preTokenizer = in.value();
                    break;
                case "decoder":
                    decoder = in.value();
                    break;
                case "post_processor":
                    postProcessor = in.value();
                    break;
                case "added_tokens": {
                    Object value = in.value();
                    if (!(value instanceof List)) {
                        throw in.error("added_tokens is not a list");
                    }
                    addedTokens = (List<?>) value;
                    break;
                }
                case "model":
                    model = BpeReader.read(in);
                    break;
                default: // truncation and padding among them, which the Python runtime switches off, too
                    in.value();
            }
        }
        if (model == null) {
            throw in.error("it has no model");
        }
        Normalizer normal = Normalizer.of(normalizer);
        AddedTokens added = new AddedTokens(addedTokens, model.vocabulary, normal);
        Ids before = new Ids();
        Ids after = new Ids();
        template(postProcessor, before, after);
        return new Tokenizer(model, added, normal, PreTokenizer.of(preTokenizer),
            TokenDecoder.of(decoder), before.toArray(), after.toArray());
    }

    /** Reads what is put around one text. */
    private static void template(Object value, Ids before, Ids after) throws FormatException {
        if (value == null) {
            return;
        }
        Step step = Step.of(value, "post_processor");
        switch (step.type()) {
            case "ByteLevel":
                return;
            case "Sequence":
                for (Object part : step.fields.list("processors")) {
                    template(part, before, after);
                }
                return;
            case "TemplateProcessing": {
                boolean text = false;
                for (Fields part : step.fields.objects("single")) {
                    if (part.has("Sequence")) {
                        text = true;
                        continue;
                    }
                    String token = part.object("SpecialToken").text("id");
                    for (int id : step.fields.object("special_tokens").object(token).counts("ids", 0)) {
                        (text ? after : before).add(id);
                    }
                }
                return;
            }
            default:
                throw step.unknown();
        }
    }

    /**
     * The token ids of a text.
     *
     * @param specialTokens whether to add what the model expects around it, such as a token that begins a text
     */
    public int[] encode(String text, boolean specialTokens) {
        Ids out = new Ids();
        if (specialTokens) {
            addAll(out, before);
        }
        for (TokenFinder.Part part : added.raw.split(Piece.whole(text))) {
            if (part.id < 0) {
                encodePart(part.piece, out);
            } else {
                out.add(part.id);
            }
        }
        if (specialTokens) {
            addAll(out, after);
        }
        return out.toArray();
    }

    private void encodePart(Piece piece, Ids out) {
        for (TokenFinder.Part part : added.normalized.split(normalizer.apply(piece))) {
            if (part.id >= 0) {
                out.add(part.id);
                continue;
            }
            for (Piece word : preTokenizer.split(Collections.singletonList(part.piece))) {
                model.encode(word.text, out);
            }
        }
    }

    /** The text of token ids; special tokens, and ids that there are not, are passed over. */
    public String decode(int[] ids) {
        List<String> tokens = new ArrayList<>();
        for (int id : ids) {
            String token = token(id);
            if (token != null && !added.isSpecial(token)) {
                tokens.add(token);
            }
        }
        return String.join("", decoder.decode(tokens));
    }

    private String token(int id) {
        String token = added.token(id);
        return token == null ? model.vocabulary.token(id) : token;
    }

    /** Ids of special tokens. */
    public Set<Integer> specialIds() {
        return Collections.unmodifiableSet(added.specialIds());
    }

    /** Whether a token is a single byte, such as {@code <0x0A>}. */
    public boolean isByte(int id) {
        String token = token(id);
        return token != null && TokenDecoder.byteToken(token) >= 0;
    }

    private static void addAll(Ids out, int[] ids) {
        for (int id : ids) {
            out.add(id);
        }
    }
}
