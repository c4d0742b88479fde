package dev.flrc.engine.decode;

import java.nio.charset.StandardCharsets;
import java.util.Arrays;

/**
 * Whether the kernels of integer weights may round activations to int8 (4) or not (0): an attribute of every such operator
 * of a graph, which onnxruntime lets nobody set but the graph's own file.
 */
public final class AccuracyLevel {
    /** What the exporter wrote. */
    public static final int AS_EXPORTED = -1;

    // AttributeProto (onnx.proto): field 1 is the name, 3 the integer, which is one byte as far as levels go.
    private static final byte[] ATTRIBUTE = "\012\016accuracy_level\030".getBytes(StandardCharsets.ISO_8859_1);
    private static final byte[] KIND = {(byte) 0xA0, 0x01, 0x02}; // field 20: an integer

    private AccuracyLevel() {
    }

    /**
     * A graph with another level at each of its operators.
     *
     * @param graph a serialized ModelProto; it is left as it is
     * @param level from 0 to 4, as {@code MatMulNBits} defines them
     */
    static byte[] set(byte[] graph, int level) {
        byte[] changed = graph.clone();
        int after = ATTRIBUTE.length + 1;
        for (int i = 0; i + after + KIND.length <= changed.length; i++) {
            if (changed[i] == ATTRIBUTE[0] && equal(changed, i, ATTRIBUTE) && equal(changed, i + after, KIND)) {
                changed[i + ATTRIBUTE.length] = (byte) level;
            }
        }
        return changed;
    }

    private static boolean equal(byte[] data, int at, byte[] wanted) {
        return Arrays.equals(data, at, at + wanted.length, wanted, 0, wanted.length);
    }
}
