package dev.flrc.engine.decode;

import ai.onnxruntime.OnnxTensor;
import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtSession;
import dev.flrc.engine.FlrcException;
import dev.flrc.engine.Manifest;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.LongBuffer;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

/**
 * One sequence in the graphs: its KV cache, and token ids in, logits out.
 *
 * <p>Every stage appends to the same buffers, which are fed as past and pinned as present, so moving to another stage
 * copies nothing.
 */
public final class Decoder implements AutoCloseable {
    private static final int MAX_CHUNK = 256;
    private static final long MAX_LOGITS_BYTES = 64L << 20;

    private final StageSessions sessions;
    private final int context;
    private final int vocab;
    private final List<OnnxTensor> owned = new ArrayList<>();
    private final Map<String, OnnxTensor> inputs = new HashMap<>(); // the cache, and what each run puts beside it
    private final Map<String, OnnxTensor> outputs = new HashMap<>();
    private final LongBuffer ones;
    private final LongBuffer id = longs(1);
    private final FloatBuffer logits;
    private final OnnxTensor idTensor;
    private final OnnxTensor logitsTensor;
    private int length;

    /**
     * @param sessions of the bundle
     * @param context positions to hold
     */
    public Decoder(StageSessions sessions, int context) throws FlrcException {
        Manifest manifest = sessions.manifest();
        if (context < 2 || context > manifest.contextLength) {
            throw new FlrcException(
                "context " + context + " is not from 2 to the model's " + manifest.contextLength + " tokens");
        }
        this.sessions = sessions;
        this.context = context;
        this.vocab = manifest.vocabSize;
        try {
            long[] shape = {1, manifest.numKvHeads, context, manifest.headDim};
            for (int layer = 0; layer < manifest.numLayers; layer++) {
                for (String kind : new String[] {"key", "value"}) {
                    OnnxTensor cache = floats(floats((int) (shape[1] * shape[2] * shape[3])), shape);
                    inputs.put("past_key_values." + layer + "." + kind, cache);
                    outputs.put("present." + layer + "." + kind, cache);
                }
            }
            ones = longs(context);
            for (int i = 0; i < context; i++) {
                ones.put(i, 1);
            }
            idTensor = own(OnnxTensor.createTensor(sessions.environment(), id, new long[] {1, 1}));
            logits = floats(vocab);
            logitsTensor = floats(logits, new long[] {1, 1, vocab});
        } catch (OrtException e) {
            close();
            throw new FlrcException("there is no room for " + context + " positions: " + StageSessions.reason(e),
                "choose a shorter context");
        } catch (OutOfMemoryError e) {
            close();
            throw new FlrcException("there is no room for " + context + " positions", "choose a shorter context");
        }
    }

    /** Positions fed so far. */
    public int length() {
        return length;
    }

    /** Positions there is room for. */
    public int context() {
        return context;
    }

    /** Forgets every position from this one on. */
    public void rollback(int position) throws FlrcException {
        if (position < 0 || position > length) {
            throw new FlrcException("cannot roll back to " + position + ": the cache holds " + length + " positions");
        }
        length = position;
    }

    /** Feeds one token; the logits of the next one, {@code [vocab]}, are overwritten by the next step. */
    public FloatBuffer step(int token, int stage) throws FlrcException {
        id.put(0, token);
        run(idTensor, 1, stage, logitsTensor);
        return logits;
    }

    /**
     * Feeds a prompt of at least one token; the logits of the next one, {@code [vocab]}.
     *
     * <p>The graphs can leave out logits of all positions but the last ({@code logits_start}); onnxruntime's Java API does
     * not feed initializers, so here they are computed for every position of a chunk.
     */
    public FloatBuffer prefill(int[] ids, int stage) throws FlrcException {
        int chunk = (int) Math.max(1, Math.min(MAX_CHUNK, MAX_LOGITS_BYTES / (4L * vocab)));
        for (int start = 0; start < ids.length; start += chunk) {
            int count = Math.min(chunk, ids.length - start);
            float[] all = feed(Arrays.copyOfRange(ids, start, start + count), stage);
            logits.clear();
            logits.put(all, (count - 1) * vocab, vocab);
            logits.clear();
        }
        return logits;
    }

    /** Feeds several tokens at once; the logits after each, {@code [ids, vocab]} row by row. */
    public float[] feed(int[] ids, int stage) throws FlrcException {
        LongBuffer row = longs(ids.length);
        for (int i = 0; i < ids.length; i++) {
            row.put(i, ids[i]);
        }
        FloatBuffer out = floats(Math.multiplyExact(ids.length, vocab));
        long[] shape = {1, ids.length, vocab};
        try (OnnxTensor input = OnnxTensor.createTensor(sessions.environment(), row, new long[] {1, ids.length});
            OnnxTensor output = OnnxTensor.createTensor(sessions.environment(), out, shape)) {
            run(input, ids.length, stage, output);
        } catch (OrtException e) {
            throw failed(stage, e);
        }
        float[] result = new float[out.capacity()];
        out.get(result);
        return result;
    }

    private void run(OnnxTensor ids, int count, int stage, OnnxTensor output) throws FlrcException {
        int total = length + count;
        if (total > context) { // the graph would write past the end of the buffers
            throw new FlrcException("position " + total + " is outside the context of " + context);
        }
        OrtSession session = sessions.get(stage);
        inputs.put("input_ids", ids);
        outputs.put("logits", output);
        ones.position(0).limit(total);
        try (OnnxTensor mask = OnnxTensor.createTensor(sessions.environment(), ones, new long[] {1, total})) {
            inputs.put("attention_mask", mask);
            session.run(inputs, Collections.emptySet(), outputs).close();
        } catch (OrtException e) {
            throw failed(stage, e);
        } finally {
            ones.clear();
        }
        length = total;
    }

    private FlrcException failed(int stage, OrtException error) {
        return new FlrcException(
            "stage " + stage + " failed at position " + length + ": " + StageSessions.reason(error));
    }

    private OnnxTensor floats(FloatBuffer buffer, long[] shape) throws OrtException {
        return own(OnnxTensor.createTensor(sessions.environment(), buffer, shape));
    }

    private OnnxTensor own(OnnxTensor tensor) {
        owned.add(tensor);
        return tensor;
    }

    // Only direct buffers are passed to native code without a copy.
    private static FloatBuffer floats(int count) {
        return direct(Math.multiplyExact(count, 4)).asFloatBuffer();
    }

    private static LongBuffer longs(int count) {
        return direct(Math.multiplyExact(count, 8)).asLongBuffer();
    }

    private static ByteBuffer direct(int bytes) {
        return ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder());
    }

    @Override
    public void close() {
        for (OnnxTensor tensor : owned) {
            tensor.close();
        }
        owned.clear();
    }
}
