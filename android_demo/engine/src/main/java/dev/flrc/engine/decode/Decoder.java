package dev.flrc.engine.decode;

import ai.onnxruntime.OnnxJavaType;
import ai.onnxruntime.OnnxTensor;
import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtSession;
import dev.flrc.engine.FlrcException;
import dev.flrc.engine.LogitsStart;
import dev.flrc.engine.Manifest;
import dev.flrc.engine.NumericalException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.LongBuffer;
import java.util.ArrayList;
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
    private static final long MAX_LOGITS_BYTES = 64L << 20; // of graphs that give those of every position
    private static final long MAX_BUFFER_BYTES = Integer.MAX_VALUE - 64L; // that a direct buffer and onnxruntime take
    private static final String NOT_FINITE = "a value that is not finite"; // how an error of our own operators ends

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
    private final OnnxTensor lastTensor; // the position that logits are wanted from: the last
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
            long[] shape = sessions.cacheShape(context);
            for (int layer = 0; layer < manifest.numLayers; layer++) {
                for (String kind : new String[] {"key", "value"}) {
                    OnnxTensor cache = cache(shape, manifest.operators != 0);
                    inputs.put("past_key_values." + layer + "." + kind, cache);
                    outputs.put("present." + layer + "." + kind, cache);
                }
            }
            ones = longs(context);
            for (int i = 0; i < context; i++) {
                ones.put(i, 1);
            }
            idTensor = own(OnnxTensor.createTensor(sessions.environment(), id, new long[] {1, 1}));
            lastTensor = own(OnnxTensor.createTensor(sessions.environment(), longs(1).put(0, -1), new long[] {1}));
            logits = floats(vocab);
            logitsTensor = own(OnnxTensor.createTensor(sessions.environment(), logits, new long[] {1, 1, vocab}));
        } catch (OrtException e) {
            close();
            throw new FlrcException("there is no room for " + context + " positions: " + StageSessions.reason(e),
                "choose a shorter context");
        } catch (OutOfMemoryError e) {
            close();
            throw new FlrcException("there is no room for " + context + " positions", "choose a shorter context");
        } catch (FlrcException e) {
            close();
            throw e;
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
     * Feeds a prompt of at least one token, in chunks; the logits of the next one, {@code [vocab]}.
     *
     * <p>Graphs of earlier releases give logits of every position of a chunk, which has to be smaller then.
     */
    public FloatBuffer prefill(int[] ids, int stage) throws FlrcException {
        boolean lastOnly = sessions.get(stage).getInputNames().contains(LogitsStart.NAME);
        int chunk = lastOnly ? MAX_CHUNK : (int) Math.max(1, Math.min(MAX_CHUNK, MAX_LOGITS_BYTES / (4L * vocab)));
        for (int start = 0; start < ids.length; start += chunk) {
            int count = Math.min(chunk, ids.length - start);
            LongBuffer row = longs(count);
            for (int i = 0; i < count; i++) {
                row.put(i, ids[start + i]);
            }
            int rows = lastOnly ? 1 : count;
            FloatBuffer out = lastOnly ? logits : floats(Math.multiplyExact(rows, vocab));
            long[] shape = {1, rows, vocab};
            try (OnnxTensor input = OnnxTensor.createTensor(sessions.environment(), row, new long[] {1, count});
                OnnxTensor output = OnnxTensor.createTensor(sessions.environment(), out, shape)) {
                run(input, count, stage, output);
            } catch (OrtException e) {
                throw failed(stage, count, e);
            }
            if (!lastOnly) {
                out.position((rows - 1) * vocab);
                logits.clear();
                logits.put(out);
                logits.clear();
            }
        }
        return logits;
    }

    private void run(OnnxTensor ids, int count, int stage, OnnxTensor output) throws FlrcException {
        int total = length + count;
        if (total > context) { // the graph would write past the end of the buffers
            throw new FlrcException("position " + total + " is outside the context of " + context);
        }
        OrtSession session = sessions.get(stage);
        inputs.put("input_ids", ids);
        if (session.getInputNames().contains(LogitsStart.NAME)) {
            inputs.put(LogitsStart.NAME, lastTensor);
        } else {
            inputs.remove(LogitsStart.NAME);
        }
        outputs.put("logits", output);
        ones.position(0).limit(total);
        try (OnnxTensor mask = OnnxTensor.createTensor(sessions.environment(), ones, new long[] {1, total})) {
            inputs.put("attention_mask", mask);
            session.run(inputs, Collections.emptySet(), outputs).close();
        } catch (OrtException e) {
            throw failed(stage, count, e);
        } finally {
            ones.clear();
        }
        length = total;
    }

    private FlrcException failed(int stage, int count, OrtException error) {
        String reason = StageSessions.reason(error);
        int position = length + count - 1;
        return reason.endsWith(NOT_FINITE)
            ? new NumericalException("stage " + stage + " met a number that is not finite at position " + position)
            : new FlrcException("stage " + stage + " failed at position " + position + ": " + reason);
    }

    private OnnxTensor cache(long[] shape, boolean blocks) throws FlrcException, OrtException {
        double bytes = (blocks ? 1.0 : 4.0) * shape[1] * shape[2] * shape[3];
        if (bytes > MAX_BUFFER_BYTES) {
            throw new FlrcException("there is no room for " + context + " positions", "choose a shorter context");
        }
        ByteBuffer buffer = direct((int) bytes);
        return own(blocks ? OnnxTensor.createTensor(sessions.environment(), buffer, shape, OnnxJavaType.UINT8)
            : OnnxTensor.createTensor(sessions.environment(), buffer.asFloatBuffer(), shape));
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
