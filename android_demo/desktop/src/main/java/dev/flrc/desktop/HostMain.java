package dev.flrc.desktop;

import dev.flrc.engine.Fields;
import dev.flrc.engine.FlrcException;
import dev.flrc.engine.JsonReader;
import dev.flrc.engine.decode.EngineService;
import dev.flrc.engine.decode.LibraryService;
import dev.flrc.engine.library.FolderSource;
import java.io.BufferedReader;
import java.io.ByteArrayInputStream;
import java.io.File;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;

/**
 * The app's engine on a desktop: commands on stdin, events on stdout, a line of JSON each.
 *
 * <p>With a folder as argument, that of the app's bundles, it takes the library's commands too, and {@code
 * {"type":"import","folder":…}} in place of the picker of a phone.
 */
public final class HostMain {
    private HostMain() {
    }

    public static void main(String[] arguments) throws IOException, FlrcException {
        PrintStream out = new PrintStream(System.out, true, "UTF-8");
        BufferedReader in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        if (arguments.length == 0) {
            try (EngineService engine = new EngineService(out::println)) {
                for (String line = in.readLine(); line != null; line = in.readLine()) {
                    engine.command(line);
                }
            }
            return;
        }
        try (LibraryService library = new LibraryService(new File(arguments[0]), out::println)) {
            for (String line = in.readLine(); line != null; line = in.readLine()) {
                File picked = picked(line);
                if (picked == null) {
                    library.command(line);
                } else {
                    library.add(picked.getName(), new FolderSource(picked));
                }
            }
        }
    }

    /** The folder that an import names; null for another command. */
    private static File picked(String line) {
        try {
            byte[] bytes = line.getBytes(StandardCharsets.UTF_8);
            Fields asked = Fields.of(new JsonReader(new ByteArrayInputStream(bytes), "the command").value(), "the command");
            return asked.text("type").equals("import") ? new File(asked.text("folder")) : null;
        } catch (FlrcException e) {
            return null; // the library says what is wrong
        }
    }
}
