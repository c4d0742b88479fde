package dev.flrc.engine.decode;

import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtSession;
import dev.flrc.engine.FlrcException;
import java.io.File;

/**
 * The operator library (runtime/kernels), registered with every session where it is present: in an APK by its name, on a
 * desktop JVM the file that FLRC_EDGE_KERNELS names. Without it, graphs of onnxruntime's own operators still open.
 */
final class Kernels {
    private static final String NAME = "flrc_kernels";
    private static final String FILE = "FLRC_EDGE_KERNELS";

    /** What onnxruntime opens; null if there is no library. It stays loaded: closed options close it under their session. */
    private static String loaded;
    private static boolean looked;

    private Kernels() {}

    /**
     * @throws FlrcException the library that is named cannot be loaded, or onnxruntime refuses it
     */
    static synchronized void register(OrtSession.SessionOptions options) throws FlrcException {
        if (!looked) {
            loaded = load(System.getenv(FILE));
            looked = true;
        }
        if (loaded == null) {
            return;
        }
        try {
            options.registerCustomOpLibrary(loaded);
        } catch (OrtException e) {
            throw new FlrcException("onnxruntime does not take the operator library: " + StageSessions.reason(e));
        }
    }

    private static String load(String file) throws FlrcException {
        if (file == null || file.isEmpty()) {
            try {
                System.loadLibrary(NAME);
                return System.mapLibraryName(NAME);
            } catch (UnsatisfiedLinkError e) {
                return null;
            }
        }
        try {
            String path = new File(file).getAbsolutePath();
            System.load(path);
            return path;
        } catch (UnsatisfiedLinkError e) {
            throw new FlrcException(
                "the operator library " + file + " cannot be loaded", "set " + FILE + " to the one that build.py made");
        }
    }
}
