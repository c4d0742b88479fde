package dev.flrc.engine;

/**
 * The position that logits are wanted from: an initializer of the graphs that may be overridden, which onnxruntime's Java API
 * cannot do. Here it becomes an input like the others.
 */
public final class LogitsStart {
    /** Its name. */
    public static final String NAME = "logits_start";
    private static final int MODEL_GRAPH = 7;
    private static final int GRAPH_INITIALIZER = 5;
    private static final int TENSOR_NAME = 8;
    private static final byte INITIALIZER = GRAPH_INITIALIZER << 3 | 2; // how such a field begins
    private static final byte NO_FIELD = 6 << 3 | 2; // one that graphs do not have: it is passed over

    private LogitsStart() {
    }

    /**
     * Makes it an input that has to be fed; a graph without it, of an earlier release, stays as it is.
     *
     * @param graph a serialized ModelProto, which is changed
     */
    public static void makeInput(byte[] graph) throws FormatException {
        ProtobufReader model = new ProtobufReader(graph, 0, graph.length);
        while (model.next()) {
            if (model.number() != MODEL_GRAPH || !model.isBytes()) {
                continue;
            }
            ProtobufReader part = model.message();
            while (part.next()) {
                if (graph[part.place()] == INITIALIZER && isNamed(part.message())) {
                    graph[part.place()] = NO_FIELD;
                }
            }
        }
    }

    private static boolean isNamed(ProtobufReader tensor) throws FormatException {
        while (tensor.next()) {
            if (tensor.number() == TENSOR_NAME && tensor.isBytes()) {
                return tensor.text().equals(NAME);
            }
        }
        return false;
    }
}
