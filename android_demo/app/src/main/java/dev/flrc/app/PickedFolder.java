package dev.flrc.app;

import android.content.ContentResolver;
import android.database.Cursor;
import android.net.Uri;
import android.provider.DocumentsContract;
import android.provider.DocumentsContract.Document;
import dev.flrc.engine.library.BundleSource;
import java.io.FileNotFoundException;
import java.io.IOException;
import java.io.InputStream;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/** A folder that the user picked through the Storage Access Framework. */
final class PickedFolder implements BundleSource {
    private final ContentResolver resolver;
    private final Uri tree;
    private Map<String, Uri> files; // by name; asked for once

    PickedFolder(ContentResolver resolver, Uri tree) {
        this.resolver = resolver;
        this.tree = tree;
    }

    /** The folder's own name. */
    String name() {
        Uri folder = DocumentsContract.buildDocumentUriUsingTree(tree, DocumentsContract.getTreeDocumentId(tree));
        try (Cursor row = resolver.query(folder, new String[] {Document.COLUMN_DISPLAY_NAME}, null, null, null)) {
            String name = row != null && row.moveToFirst() ? row.getString(0) : null;
            return name == null ? "bundle" : name;
        } catch (RuntimeException e) { // a provider may throw anything
            return "bundle";
        }
    }

    @Override
    public List<String> names() throws IOException {
        return new ArrayList<>(files().keySet());
    }

    @Override
    public InputStream open(String name) throws IOException {
        Uri file = files().get(name);
        if (file == null) {
            throw new FileNotFoundException(name);
        }
        try {
            InputStream in = resolver.openInputStream(file);
            if (in == null) {
                throw new IOException(name + " cannot be opened");
            }
            return in;
        } catch (RuntimeException e) {
            throw new IOException(name + " cannot be opened: " + e.getMessage());
        }
    }

    private Map<String, Uri> files() throws IOException {
        if (files != null) {
            return files;
        }
        Uri children =
            DocumentsContract.buildChildDocumentsUriUsingTree(tree, DocumentsContract.getTreeDocumentId(tree));
        String[] columns = {Document.COLUMN_DISPLAY_NAME, Document.COLUMN_DOCUMENT_ID, Document.COLUMN_MIME_TYPE};
        Map<String, Uri> found = new LinkedHashMap<>();
        try (Cursor rows = resolver.query(children, columns, null, null, null)) {
            if (rows == null) {
                throw new IOException("the folder cannot be listed");
            }
            while (rows.moveToNext()) {
                if (!Document.MIME_TYPE_DIR.equals(rows.getString(2))) {
                    found.put(rows.getString(0), DocumentsContract.buildDocumentUriUsingTree(tree, rows.getString(1)));
                }
            }
        } catch (RuntimeException e) {
            throw new IOException("the folder cannot be listed: " + e.getMessage());
        }
        files = found;
        return files;
    }
}
