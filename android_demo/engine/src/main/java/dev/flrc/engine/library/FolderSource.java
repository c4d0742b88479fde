package dev.flrc.engine.library;

import java.io.File;
import java.io.FileInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.util.ArrayList;
import java.util.List;

/** A folder of this machine's file system. */
public final class FolderSource implements BundleSource {
    private final File folder;

    public FolderSource(File folder) {
        this.folder = folder;
    }

    @Override
    public List<String> names() throws IOException {
        File[] files = folder.listFiles();
        if (files == null) {
            throw new IOException(folder.getName() + " is not a folder that can be read");
        }
        List<String> names = new ArrayList<>();
        for (File file : files) {
            if (file.isFile()) {
                names.add(file.getName());
            }
        }
        return names;
    }

    @Override
    public InputStream open(String name) throws IOException {
        return new FileInputStream(new File(folder, name));
    }
}
