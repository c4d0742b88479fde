package dev.flrc.engine.decode;

import dev.flrc.engine.Fields;
import dev.flrc.engine.FlrcException;
import dev.flrc.engine.JsonReader;
import dev.flrc.engine.JsonText;
import dev.flrc.engine.library.BundleLibrary;
import dev.flrc.engine.library.BundleSource;
import java.io.ByteArrayInputStream;
import java.io.File;
import java.nio.charset.StandardCharsets;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;

/**
 * The engine and the bundles that an app keeps, behind one stream of JSON commands and events.
 *
 * <p>Commands, besides those of {@link EngineService}, which are passed on: {@code {"type":"bundles"}}, {@code
 * {"type":"choose","name":…}} with the fields of {@code open} but its folder, {@code {"type":"remove","name":…}}, {@code
 * {"type":"cancel_import"}}.
 *
 * <p>Events: {@code bundles} (names, the last one opened, the one whose loading ended the program), {@code import}
 * (bytes copied, in all), {@code imported}, and {@code import_error} with a message and a hint.
 */
public final class LibraryService implements AutoCloseable {
    private static final long STEP = 4L << 20; // bytes between two events of an import

    private final EngineService.Events events;
    private final BundleLibrary library;
    private final EngineService engine;
    private final ExecutorService copier = Executors.newSingleThreadExecutor();
    private volatile boolean cancelled;
    private volatile File open; // the bundle that is open, or about to be

    /**
     * @param root the folder of the bundles
     * @throws FlrcException it cannot be made
     */
    public LibraryService(File root, EngineService.Events events) throws FlrcException {
        this.events = events;
        library = new BundleLibrary(root);
        engine = new EngineService(new EngineService.Events() {
            @Override
            public void event(String json) {
                events.event(json);
            }

            @Override
            public void loading(File folder) {
                open = folder;
                library.begin(folder);
            }

            @Override
            public void loaded(File folder, boolean opened) {
                library.end(folder, opened);
                open = opened ? folder : null;
            }
        });
    }

    /** Takes a command; returns at once. */
    public void command(String json) {
        try {
            byte[] bytes = json.getBytes(StandardCharsets.UTF_8);
            Object value = new JsonReader(new ByteArrayInputStream(bytes), "the command").value();
            Fields asked = Fields.of(value, "the command");
            switch (asked.text("type")) {
                case "bundles":
                    bundles();
                    break;
                case "choose":
                    @SuppressWarnings("unchecked")
                    Map<String, Object> fields = new LinkedHashMap<>((Map<String, Object>) value);
                    fields.remove("name");
                    fields.put("type", "open");
                    fields.put("folder", library.folder(asked.text("name")).getPath());
                    engine.command(JsonText.of(fields));
                    break;
                case "remove":
                    remove(asked.text("name"));
                    break;
                case "cancel_import":
                    cancelled = true;
                    break;
                default:
                    engine.command(json);
            }
        } catch (FlrcException e) {
            failed("error", e);
        }
    }

    /** Copies a bundle in, on a thread of its own, telling events how far it is. */
    public void add(String name, BundleSource source) {
        cancelled = false;
        copier.execute(() -> {
            long[] told = {0};
            try {
                String found = library.add(name, source, (bytes, total) -> {
                    if (bytes - told[0] >= STEP || bytes == total) {
                        told[0] = bytes;
                        Map<String, Object> event = new LinkedHashMap<>();
                        event.put("bytes", bytes);
                        event.put("total", total);
                        send("import", event);
                    }
                }, () -> cancelled);
                Map<String, Object> event = new LinkedHashMap<>();
                event.put("name", found);
                send("imported", event);
                bundles();
            } catch (FlrcException e) {
                failed("import_error", e);
            } catch (RuntimeException e) {
                failed("import_error", new FlrcException("the bundle cannot be copied: " + e, "pick the folder again"));
            }
        });
    }

    private void remove(String name) throws FlrcException {
        File folder = library.folder(name);
        if (folder.equals(open)) {
            throw new FlrcException(name + " is open", "open another bundle first");
        }
        library.delete(name);
        bundles();
    }

    private void bundles() {
        Map<String, Object> event = new LinkedHashMap<>();
        event.put("names", library.names());
        event.put("last", library.last());
        event.put("interrupted", library.interrupted());
        send("bundles", event);
    }

    private void failed(String type, FlrcException error) {
        Map<String, Object> event = new LinkedHashMap<>();
        event.put("message", error.getMessage());
        event.put("hint", error.hint());
        send(type, event);
    }

    private void send(String type, Map<String, Object> fields) {
        Map<String, Object> event = new LinkedHashMap<>();
        event.put("type", type);
        event.putAll(fields);
        events.event(JsonText.of(event));
    }

    /** Stops an import and an answer, waits for both and frees the bundle. */
    @Override
    public void close() {
        cancelled = true;
        copier.shutdown();
        engine.close();
        try {
            copier.awaitTermination(10, java.util.concurrent.TimeUnit.SECONDS);
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
        }
    }
}
