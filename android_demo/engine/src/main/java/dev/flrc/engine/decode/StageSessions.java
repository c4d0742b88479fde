package dev.flrc.engine.decode;

import ai.onnxruntime.NodeInfo;
import ai.onnxruntime.OrtEnvironment;
import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtLoggingLevel;
import ai.onnxruntime.OrtSession;
import ai.onnxruntime.TensorInfo;
import dev.flrc.engine.BundleFiles;
import dev.flrc.engine.FlrcException;
import dev.flrc.engine.FormatException;
import dev.flrc.engine.LogitsStart;
import dev.flrc.engine.Manifest;
import dev.flrc.engine.VerificationException;
import java.io.File;
import java.io.IOException;
import java.nio.file.Files;
import java.util.Iterator;
import java.util.LinkedHashMap;
import java.util.Map;

/**
 * One onnxruntime session a stage, opened at first use.
 *
 * <p>Graphs of our own operators read their weights where the file is mapped, all stages the same bytes. Of onnxruntime's
 * operators, every open session has a copy of its stage's weights, so a phone keeps few: beyond {@code resident}, those that
 * were not used for longest are closed before another is opened, and a move between stages costs the opening.
 */
public final class StageSessions implements AutoCloseable {
    private static final int BLOCK_POSITIONS = 16; // that our own operators keep together
    /** Of a graph that is not opened as a file (onnxruntime_session_options_config_keys.h). */
    private static final String WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path";

    private final File folder;
    private final Manifest manifest;
    private final int threads;
    private final int accuracyLevel;
    private final OrtEnvironment environment;
    private final int resident;
    private final Map<Integer, OrtSession> open = new LinkedHashMap<>(16, 0.75f, true); // least recently used first

    /**
     * @param folder the bundle
     * @param manifest what {@link Manifest#read} said of it
     * @param threads of one operator; 0 for onnxruntime's own choice
     * @param resident sessions that may be open at once; 0 for all stages
     */
    public StageSessions(File folder, Manifest manifest, int threads, int resident) throws FlrcException {
        this(folder, manifest, threads, resident, AccuracyLevel.AS_EXPORTED);
    }

    /**
     * @param accuracyLevel of operators with integer weights, 0 or 4, or {@link AccuracyLevel#AS_EXPORTED}; the others as
     *     above
     */
    public StageSessions(File folder, Manifest manifest, int threads, int resident, int accuracyLevel)
        throws FlrcException {
        if (accuracyLevel != AccuracyLevel.AS_EXPORTED && accuracyLevel != 0 && accuracyLevel != 4) {
            throw new FlrcException("accuracy_level: " + accuracyLevel + " is neither 0 nor 4");
        }
        this.accuracyLevel = accuracyLevel;
        this.folder = folder;
        this.manifest = manifest;
        this.threads = threads;
        this.resident = resident == 0 ? manifest.stages.size() : resident;
        this.environment = OrtEnvironment.getEnvironment(OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR, "flrc-edge");
        try {
            environment.setTelemetry(false);
        } catch (OrtException e) {
            throw new FlrcException("onnxruntime cannot be started: " + reason(e));
        }
    }

    OrtEnvironment environment() {
        return environment;
    }

    public Manifest manifest() {
        return manifest;
    }

    /**
     * The session of a stage.
     *
     * @throws VerificationException its graph is missing, or onnxruntime does not open it
     */
    public synchronized OrtSession get(int stage) throws FlrcException {
        OrtSession session = open.get(stage);
        if (session == null) {
            if (stage < 0 || stage >= manifest.stages.size()) {
                throw new FlrcException("stage " + stage + " is not one of the bundle's " + manifest.stages.size());
            }
            closeDownTo(resident - 1);
            File graph = BundleFiles.resolveInside(folder, manifest.stages.get(stage).graph);
            try (OrtSession.SessionOptions options = new OrtSession.SessionOptions()) {
                // What goes wrong is thrown; onnxruntime would print it as well.
                options.setSessionLogLevel(OrtLoggingLevel.ORT_LOGGING_LEVEL_FATAL);
                if (threads > 0) {
                    options.setIntraOpNumThreads(threads);
                }
                if (manifest.operators != 0) {
                    Kernels.register(options, manifest.operators);
                }
                session = session(graph, options);
            } catch (OrtException e) {
                throw new VerificationException(
                    folder.getName() + ": " + graph.getName() + " cannot be opened: " + reason(e), "copy the bundle again");
            }
            open.put(stage, session);
        }
        return session;
    }

    /**
     * The shape of the keys, and of the values, of one layer for so many positions: floats, or blocks of bytes in graphs of
     * our own operators. What a graph leaves open, the manifest says.
     */
    long[] cacheShape(int context) throws FlrcException, OrtException {
        NodeInfo past = get(0).getInputInfo().get("past_key_values.0.key");
        long[] shape = past != null && past.getInfo() instanceof TensorInfo
            ? ((TensorInfo) past.getInfo()).getShape() : new long[0];
        if (shape.length != 4) {
            throw new FormatException(folder.getName() + ": stage 0 has no keys and values", "copy the bundle again");
        }
        long rows = manifest.operators == 0 ? context : (context + BLOCK_POSITIONS - 1) / BLOCK_POSITIONS;
        return new long[] {
            1, shape[1] > 0 ? shape[1] : manifest.numKvHeads, rows, shape[3] > 0 ? shape[3] : manifest.headDim};
    }

    private OrtSession session(File graph, OrtSession.SessionOptions options) throws FlrcException, OrtException {
        byte[] model;
        try {
            model = Files.readAllBytes(graph.toPath());
        } catch (IOException e) {
            throw new VerificationException(graph.getName() + " cannot be read", "copy the bundle again");
        }
        LogitsStart.makeInput(model);
        if (accuracyLevel != AccuracyLevel.AS_EXPORTED) {
            AccuracyLevel.set(model, accuracyLevel);
        }
        options.addConfigEntry(WEIGHTS_FOLDER, graph.getAbsoluteFile().getParent());
        return environment.createSession(model, options);
    }

    private void closeDownTo(int most) throws FlrcException {
        Iterator<OrtSession> oldest = open.values().iterator();
        while (open.size() > most) {
            try {
                oldest.next().close();
            } catch (OrtException e) {
                throw new FlrcException("a graph cannot be closed: " + reason(e));
            }
            oldest.remove();
        }
    }

    /** How many stages are open. */
    public synchronized int openCount() {
        return open.size();
    }

    @Override
    public synchronized void close() throws FlrcException {
        closeDownTo(0);
    }

    static String reason(OrtException error) {
        String text = String.valueOf(error.getMessage());
        for (String before : new String[] {"message:", "Status Message:"}) {
            int at = text.lastIndexOf(before);
            text = at < 0 ? text : text.substring(at + before.length()).trim();
        }
        return text.split("\n", 2)[0];
    }
}
