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
     * Sets the level of every operator of a graph.
     *
     * @param graph a serialized ModelProto, which is changed
     * @param level from 0 to 4, as {@code MatMulNBits} defines them
     */
    static void set(byte[] graph, int level) {
        int after = ATTRIBUTE.length + 1;
        for (int i = 0; i + after + KIND.length <= graph.length; i++) {
            if (graph[i] == ATTRIBUTE[0] && equal(graph, i, ATTRIBUTE) && equal(graph, i + after, KIND)) {
                graph[i + ATTRIBUTE.length] = (byte) level;
            }
        }
    }

    private static boolean equal(byte[] data, int at, byte[] wanted) {
        return Arrays.equals(data, at, at + wanted.length, wanted, 0, wanted.length);
    }
}
