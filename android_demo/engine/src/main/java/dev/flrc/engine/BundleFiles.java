package dev.flrc.engine;

import java.io.BufferedInputStream;
import java.io.File;
import java.io.FileInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.nio.file.Files;
import java.nio.file.LinkOption;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.regex.Pattern;

/** The few file operations a bundle is read through: names inside a folder, hashes, small JSON files. */
public final class BundleFiles {
    /** Bytes that a JSON file of a bundle may have, the tokenizer's apart. */
    public static final long MAX_JSON_BYTES = 4L << 20;
    private static final Pattern NAME = Pattern.compile("[A-Za-z0-9._-]+");

    private BundleFiles() {
    }

    /** Refuses a name that could lead out of a folder. */
    public static void checkName(File root, String name) throws VerificationException {
        if (!NAME.matcher(name).matches() || name.equals(".") || name.equals("..")) {
            throw new VerificationException(root.getName() + ": '" + name + "' is not a plain file name");
        }
    }

    /**
     * The regular file of a name directly inside a folder.
     *
     * @throws VerificationException the name is not one component, or the file is missing, a link or not regular
     */
    public static File resolveInside(File root, String name) throws VerificationException {
        checkName(root, name);
        File file = new File(root, name);
        if (!Files.exists(file.toPath(), LinkOption.NOFOLLOW_LINKS)) {
            throw new VerificationException(root.getName() + ": " + name + " is missing", "copy the bundle again");
        }
        if (!Files.isRegularFile(file.toPath(), LinkOption.NOFOLLOW_LINKS)) {
            throw new VerificationException(root.getName() + ": " + name + " is not a regular file");
        }
        return file;
    }

    /** SHA-256 of a file as 64 hexadecimal digits. */
    public static String sha256(File file) throws VerificationException {
        try (InputStream in = new FileInputStream(file)) {
            MessageDigest digest = MessageDigest.getInstance("SHA-256");
            byte[] buffer = new byte[1 << 16];
            for (int n = in.read(buffer); n >= 0; n = in.read(buffer)) {
                digest.update(buffer, 0, n);
            }
            StringBuilder hex = new StringBuilder();
            for (byte b : digest.digest()) {
                hex.append(Character.forDigit(b >> 4 & 15, 16)).append(Character.forDigit(b & 15, 16));
            }
            return hex.toString();
        } catch (IOException | NoSuchAlgorithmException e) {
            throw new VerificationException(file.getName() + " cannot be read: " + e.getMessage());
        }
    }

    /** Reads a small JSON file strictly; see {@link JsonReader}. */
    public static Object readJson(File file) throws FormatException {
        String where = file.getParentFile().getName() + "/" + file.getName();
        if (!file.isFile()) {
            throw new FormatException(where + " is missing", "is this a folder that flrc-edge export wrote?");
        }
        if (file.length() > MAX_JSON_BYTES) {
            throw new FormatException(
                where + " is " + file.length() + " bytes, more than the " + MAX_JSON_BYTES + " a manifest may have");
        }
        try (JsonReader in = new JsonReader(new BufferedInputStream(new FileInputStream(file)), where)) {
            Object value = in.value();
            in.end();
            return value;
        } catch (IOException e) {
            throw new FormatException(where + " cannot be read: " + e.getMessage());
        }
    }
}
