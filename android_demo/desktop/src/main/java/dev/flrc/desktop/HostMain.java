package dev.flrc.desktop;

import dev.flrc.engine.decode.EngineService;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;

/** The app's engine on a desktop: commands on stdin, events on stdout, a line of JSON each. */
public final class HostMain {
    private HostMain() {
    }

    public static void main(String[] arguments) throws IOException {
        PrintStream out = new PrintStream(System.out, true, "UTF-8");
        BufferedReader in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        try (EngineService engine = new EngineService(out::println)) {
            for (String line = in.readLine(); line != null; line = in.readLine()) {
                engine.command(line);
            }
        }
    }
}
