package dev.flrc.engine.library;

import java.io.IOException;
import java.io.InputStream;
import java.util.List;

/** A folder that a bundle is copied from: one on this machine, or what the user picked on a phone. */
public interface BundleSource {
    /** Names of the files directly inside; folders are left out. */
    List<String> names() throws IOException;

    /** Opens one of them. */
    InputStream open(String name) throws IOException;
}
