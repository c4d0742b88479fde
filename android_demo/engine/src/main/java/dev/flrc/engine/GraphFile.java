package dev.flrc.engine;

import java.io.File;
import java.io.IOException;
import java.nio.file.Files;
import java.util.Arrays;
import java.util.Collections;
import java.util.HashMap;
import java.util.HashSet;
import java.util.Map;
import java.util.Set;

/**
 * What a stage graph may hold, looked at before onnxruntime's parser and kernels see the file: only the operators that
 * {@code export} writes, either our own or onnxruntime's, no graph inside an operator, no function, and weights in the
 * bundle's one file of weights. The same as the Python runtime's graph_file.py; field numbers are those of onnx.proto.
 */
final class GraphFile {
    static final String WEIGHTS = "weights.bin";
    private static final Set<String> STANDARD = new HashSet<>(Arrays.asList(
        "Add", "Cast", "CastLike", "Concat", "Gather", "Gelu", "MatMul", "Mul", "ReduceSum", "Reshape", "Shape", "Slice",
        "Split", "Sub"));
    private static final Set<String> MICROSOFT = new HashSet<>(Arrays.asList(
        "FusedMatMul", "GatherBlockQuantized", "GroupQueryAttention", "MatMulNBits", "QuickGelu", "RotaryEmbedding",
        "SkipSimplifiedLayerNormalization"));
    private static final Set<String> OWN = new HashSet<>(Arrays.asList("Attention", "Embedding", "Linear"));
    private static final int MODEL_GRAPH = 7;
    private static final int MODEL_TRAINING = 20;
    private static final int MODEL_FUNCTIONS = 25;
    private static final int GRAPH_NODE = 1;
    private static final int GRAPH_INITIALIZER = 5;
    private static final int GRAPH_SPARSE_INITIALIZER = 15;
    private static final int NODE_TYPE = 4;
    private static final int NODE_ATTRIBUTE = 5;
    private static final int NODE_DOMAIN = 7;
    private static final int ATTRIBUTE_TENSOR = 5;
    private static final int ATTRIBUTE_GRAPH = 6;
    private static final int ATTRIBUTE_TENSORS = 10;
    private static final int ATTRIBUTE_GRAPHS = 11;
    private static final int TENSOR_EXTERNAL = 13;

    private GraphFile() {
    }

    /**
     * Refuses a graph that holds what {@code export} does not write.
     *
     * @param weightBytes size of the file that its weights lie in
     * @param own whether it consists of our own operators, or of onnxruntime's
     */
    static void check(File graph, long weightBytes, boolean own) throws FormatException {
        try {
            byte[] data = Files.readAllBytes(graph.toPath());
            ProtobufReader model = new ProtobufReader(data, 0, data.length);
            int graphs = 0;
            while (model.next()) {
                if (model.number() == MODEL_TRAINING || model.number() == MODEL_FUNCTIONS) {
                    throw new FormatException("it holds functions or a way to train");
                }
                if (model.number() == MODEL_GRAPH && model.isBytes()) {
                    graphs++;
                    checkGraph(model.message(), weightBytes, own);
                }
            }
            if (graphs != 1) {
                throw new FormatException("it holds " + graphs + " graphs");
            }
        } catch (IOException | FormatException e) {
            throw new FormatException(
                graph.getName() + " is not a graph that export writes: " + e.getMessage(),
                "get the bundle again, from people you trust");
        }
    }

    private static void checkGraph(ProtobufReader graph, long weightBytes, boolean own) throws FormatException {
        while (graph.next()) {
            if (graph.number() == GRAPH_SPARSE_INITIALIZER) {
                throw new FormatException("it holds sparse weights");
            }
            if (graph.number() == GRAPH_NODE && graph.isBytes()) {
                checkNode(graph.message(), own);
            } else if (graph.number() == GRAPH_INITIALIZER && graph.isBytes()) {
                checkTensor(graph.message(), weightBytes);
            }
        }
    }

    private static void checkNode(ProtobufReader node, boolean own) throws FormatException {
        String kind = "";
        String domain = "";
        while (node.next()) {
            if (!node.isBytes()) {
                continue;
            }
            if (node.number() == NODE_TYPE) {
                kind = node.text();
            } else if (node.number() == NODE_DOMAIN) {
                domain = node.text();
            } else if (node.number() == NODE_ATTRIBUTE) {
                checkAttribute(node.message());
            }
        }
        if (!known(domain, own).contains(kind)) {
            throw new FormatException("the operator " + (domain.isEmpty() ? "" : domain + ".") + kind + " is not known");
        }
    }

    private static Set<String> known(String domain, boolean own) {
        switch (domain) {
            case "":
            case "ai.onnx":
                return own ? Collections.emptySet() : STANDARD;
            case "com.microsoft":
                return own ? Collections.emptySet() : MICROSOFT;
            case "flrc":
                return own ? OWN : Collections.emptySet();
            default:
                return Collections.emptySet();
        }
    }

    private static void checkAttribute(ProtobufReader attribute) throws FormatException {
        while (attribute.next()) {
            switch (attribute.number()) {
                case ATTRIBUTE_GRAPH:
                case ATTRIBUTE_GRAPHS:
                case ATTRIBUTE_TENSORS:
                    throw new FormatException("an operator holds a graph or a list of tensors");
                case ATTRIBUTE_TENSOR:
                    if (attribute.isBytes()) {
                        checkTensor(attribute.message(), -1);
                    }
                    break;
                default:
                    break;
            }
        }
    }

    /** Checks where the weights of a tensor lie; with a negative size, they may lie in no other file. */
    private static void checkTensor(ProtobufReader tensor, long weightBytes) throws FormatException {
        Map<String, String> external = new HashMap<>();
        while (tensor.next()) {
            if (tensor.number() == TENSOR_EXTERNAL && tensor.isBytes()) {
                ProtobufReader entry = tensor.message();
                String key = entry.next() && entry.isBytes() ? entry.text() : null;
                String value = entry.next() && entry.isBytes() ? entry.text() : null;
                if (key == null || value == null || entry.next() || external.put(key, value) != null) {
                    throw new FormatException("a place of weights is said twice or by half");
                }
            }
        }
        if (external.isEmpty()) {
            return;
        }
        String location = external.getOrDefault("location", "");
        if (weightBytes < 0 || !WEIGHTS.equals(location)) {
            throw new FormatException("weights lie in '" + location + "', which the manifest does not list for them");
        }
        long last = count(external.get("offset")) + count(external.get("length"));
        if (last > weightBytes) {
            throw new FormatException("weights end at byte " + last + " of " + location + ", which has " + weightBytes);
        }
    }

    private static long count(String text) throws FormatException {
        if (text == null) {
            return 0;
        }
        if (!text.matches("[0-9]{1,18}")) {
            throw new FormatException("'" + text + "' is no place in a file");
        }
        return Long.parseLong(text);
    }
}
