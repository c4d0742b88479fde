package dev.flrc.engine.library;

import dev.flrc.engine.BundleFiles;
import dev.flrc.engine.FlrcException;
import dev.flrc.engine.FormatException;
import dev.flrc.engine.Manifest;
import java.io.File;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.LinkOption;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Map;

/**
 * The bundles that an app keeps, each a folder inside one root; a bundle is copied in whole and verified, or not at all.
 *
 * <p>While a bundle loads, a marker names it: one that is found at the next start belongs to a load that ended the
 * program, and is not to be repeated unasked.
 */
public final class BundleLibrary {
    /** Takes how much was copied. */
    public interface Progress {
        void copied(long bytes, long total);
    }

    /** Asked after every block whether to go on. */
    public interface Cancelled {
        boolean get();
    }

    private static final String MANIFEST = "flrc.json";
    private static final String SCRATCH = ".import-";
    private static final String LOADING = ".loading";
    private static final String LAST = ".last";
    private static final long KEPT_FREE = 32L << 20; // bytes that an import leaves to the device
    private static final int BLOCK = 1 << 18;

    private final File root;
    private final String interrupted;

    /**
     * Opens the library and removes what an import that was cut off left behind.
     *
     * @throws FlrcException the folder cannot be made
     */
    public BundleLibrary(File root) throws FlrcException {
        this.root = root;
        if (!root.isDirectory() && !root.mkdirs()) {
            throw new FlrcException(root.getName() + " cannot be made", "free some space and start again");
        }
        for (File left : list(root)) {
            if (left.getName().startsWith(SCRATCH)) {
                remove(left);
            }
        }
        interrupted = line(LOADING);
        new File(root, LOADING).delete();
    }

    /** The bundle whose loading ended the program the last time; null if none did. */
    public String interrupted() {
        return interrupted;
    }

    /** The bundle that was opened last and is still there; null if there is none. */
    public String last() {
        String name = line(LAST);
        return name != null && names().contains(name) ? name : null;
    }

    /** Names of the bundles, sorted; folders without a manifest are none. */
    public List<String> names() {
        List<String> names = new ArrayList<>();
        for (File folder : list(root)) {
            if (!folder.getName().startsWith(".") && new File(folder, MANIFEST).isFile()) {
                names.add(folder.getName());
            }
        }
        return names;
    }

    /**
     * The folder of a bundle.
     *
     * @throws FlrcException there is none of this name
     */
    public File folder(String name) throws FlrcException {
        BundleFiles.checkName(root, name);
        if (!names().contains(name)) {
            throw new FlrcException("there is no bundle '" + name + "'", "import it first");
        }
        return new File(root, name);
    }

    /** Says that a bundle begins to load. */
    public void begin(File folder) {
        write(LOADING, folder.getName());
    }

    /** Says that loading ended, well or with an error. */
    public void end(File folder, boolean opened) {
        new File(root, LOADING).delete();
        if (opened) {
            write(LAST, folder.getName());
        }
    }

    /**
     * Removes a bundle, which must not be open.
     *
     * @throws FlrcException there is none of this name, or it cannot be removed
     */
    public void delete(String name) throws FlrcException {
        File gone = new File(root, SCRATCH + name);
        remove(gone);
        if (!folder(name).renameTo(gone)) { // in one step: half a bundle is never seen
            throw new FlrcException(name + " cannot be removed", "close it first");
        }
        remove(gone);
    }

    /**
     * Copies a bundle in and verifies every file.
     *
     * @param asked a name for it, made plain; the one of another bundle gets a number
     * @return the name it got
     * @throws FlrcException it is no bundle, it is damaged, there is no room, it cannot be read, or it was cancelled;
     *     nothing is left behind
     */
    public String add(String asked, BundleSource source, Progress progress, Cancelled cancelled) throws FlrcException {
        File scratch = new File(root, SCRATCH + Long.toHexString(System.nanoTime()));
        if (!scratch.mkdir()) {
            throw new FlrcException("no folder can be made for the bundle", "free some space and import it again");
        }
        try {
            copy(source, MANIFEST, scratch, BundleFiles.MAX_JSON_BYTES, 0, 0, null, cancelled);
            Map<String, Long> sizes = Manifest.listed(scratch);
            List<String> there = source.names();
            long total = 0;
            for (Map.Entry<String, Long> file : sizes.entrySet()) {
                BundleFiles.checkName(scratch, file.getKey());
                if (!there.contains(file.getKey())) {
                    throw new FlrcException(file.getKey() + " is missing", "pick the folder that flrc-edge export wrote");
                }
                total += file.getValue();
            }
            long free = root.getUsableSpace() - KEPT_FREE;
            if (total > free) {
                throw new FlrcException("the bundle takes " + megabytes(total) + ", " + megabytes(Math.max(free, 0))
                    + " are free", "remove another bundle, or something else of this device");
            }
            long done = 0;
            for (Map.Entry<String, Long> file : sizes.entrySet()) {
                done += copy(source, file.getKey(), scratch, file.getValue(), done, total, progress, cancelled);
            }
            Manifest.verify(scratch);
            return publish(scratch, asked);
        } catch (IOException e) {
            String why = root.getUsableSpace() < BLOCK ? "this device is full" : "the bundle cannot be copied: " + e.getMessage();
            throw new FlrcException(why, "free some space, or pick the folder again");
        } finally {
            remove(scratch);
        }
    }

    private static long copy(
        BundleSource source, String name, File folder, long most, long before, long total, Progress progress,
        Cancelled cancelled) throws IOException, FlrcException {
        long done = 0;
        try (InputStream in = source.open(name); FileOutputStream out = new FileOutputStream(new File(folder, name))) {
            byte[] block = new byte[BLOCK];
            for (int n = in.read(block); n >= 0; n = in.read(block)) {
                if (cancelled.get()) {
                    throw new FlrcException("the import was stopped");
                }
                done += n;
                if (done > most) {
                    throw new FormatException(name + " has more than the " + most + " bytes that it may have",
                        "pick the folder that flrc-edge export wrote");
                }
                out.write(block, 0, n);
                if (progress != null) {
                    progress.copied(before + done, total);
                }
            }
            out.getFD().sync();
        } catch (java.io.FileNotFoundException e) {
            throw new FlrcException(name + " is missing or cannot be read", "pick the folder that flrc-edge export wrote");
        }
        return done;
    }

    private String publish(File scratch, String asked) throws FlrcException {
        String plain = asked.replaceAll("[^A-Za-z0-9._-]+", "-").replaceAll("^[.-]+", "");
        String base = plain.isEmpty() ? "bundle" : plain;
        for (int i = 1; i < 1000; i++) {
            String name = i == 1 ? base : base + "-" + i;
            File target = new File(root, name);
            if (!target.exists()) {
                if (scratch.renameTo(target)) {
                    return name;
                }
                break;
            }
        }
        throw new FlrcException("the bundle cannot be kept under the name " + base, "rename the folder and import it again");
    }

    private String line(String file) {
        try {
            byte[] text = Files.readAllBytes(new File(root, file).toPath());
            return new String(text, StandardCharsets.UTF_8);
        } catch (IOException e) {
            return null;
        }
    }

    private void write(String file, String text) {
        try (FileOutputStream out = new FileOutputStream(new File(root, file))) {
            out.write(text.getBytes(StandardCharsets.UTF_8));
            out.getFD().sync();
        } catch (IOException e) {
            // Without the marker a load that crashes is tried again: no reason not to load.
        }
    }

    private static List<File> list(File folder) {
        File[] files = folder.listFiles();
        if (files == null) {
            return new ArrayList<>();
        }
        Arrays.sort(files);
        return Arrays.asList(files);
    }

    private static void remove(File file) {
        if (Files.isDirectory(file.toPath(), LinkOption.NOFOLLOW_LINKS)) {
            for (File inside : list(file)) {
                remove(inside);
            }
        }
        file.delete();
    }

    private static String megabytes(long bytes) {
        return (bytes + 999_999) / 1_000_000 + " MB";
    }
}
