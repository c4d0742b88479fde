package dev.flrc.engine.decode;

import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtSession;
import dev.flrc.engine.FlrcException;
import java.io.File;

/**
 * The operator library (runtime/kernels), which bundles of our own operators need: in an APK by its name, on a desktop JVM
 * the file that FLRC_EDGE_KERNELS names.
 */
final class Kernels {
    private static final String NAME = "flrc_kernels";
    private static final String FILE = "FLRC_EDGE_KERNELS";
    private static final String REMEDY = "set " + FILE + " to the library that runtime/kernels/build.py made";

    /** What onnxruntime opens; null before the first use. It stays loaded: closed options close it under their session. */
    private static String loaded;

    private Kernels() {}

    /**
     * Lets sessions that are opened with these options know the operators.
     *
     * @param version of the operators that a bundle consists of
     * @throws FlrcException the library is missing, cannot be loaded or is of another version, or onnxruntime refuses it
     */
    static synchronized void register(OrtSession.SessionOptions options, int version) throws FlrcException {
        if (loaded == null) {
            loaded = load(System.getenv(FILE));
        }
        int found;
        try {
            found = version();
        } catch (UnsatisfiedLinkError e) {
            throw new FlrcException(loaded + " is no library of flrc-edge's operators", REMEDY);
        }
        if (found != version) {
            throw new FlrcException("the bundle needs version " + version + " of the operators, the library here is of version "
                + found, "export the bundle with the version of flrc-edge that this app is of");
        }
        try {
            options.registerCustomOpLibrary(loaded);
        } catch (OrtException e) {
            throw new FlrcException("onnxruntime does not take the operator library: " + StageSessions.reason(e));
        }
    }

    /** Of the loaded library (register.c). */
    private static native int version();

    private static String load(String file) throws FlrcException {
        boolean named = file != null && !file.isEmpty();
        try {
            if (named) {
                String path = new File(file).getAbsolutePath();
                System.load(path);
                return path;
            }
            System.loadLibrary(NAME);
            return System.mapLibraryName(NAME);
        } catch (UnsatisfiedLinkError e) {
            throw new FlrcException(named ? "the operator library " + file + " cannot be loaded"
                : "the bundle needs the operator library, which is not here", REMEDY);
        }
    }
}
