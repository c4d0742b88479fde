package dev.flrc.engine;

import java.io.BufferedReader;
import java.io.ByteArrayInputStream;
import java.io.File;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.List;

/** Answers a JSON list of messages with their prompt as a JSON string, a line each; null without frames. */
public final class ChatCheck {
    private ChatCheck() {
    }

    public static void main(String[] arguments) throws Exception {
        PrintStream out = new PrintStream(System.out, true, "UTF-8");
        try {
            File folder = new File(arguments[0]);
            ChatFrames frames = ChatFrames.open(folder, Manifest.read(folder));
            BufferedReader in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
            for (String line = in.readLine(); line != null; line = in.readLine()) {
                byte[] bytes = line.getBytes(StandardCharsets.UTF_8);
                Object asked = new JsonReader(new ByteArrayInputStream(bytes), "the request").value();
                List<ChatFrames.Message> messages = new ArrayList<>();
                for (Object one : (List<?>) asked) {
                    Fields message = Fields.of(one, "message");
                    messages.add(new ChatFrames.Message(message.text("role"), message.text("content")));
                }
                out.println(JsonText.of(frames == null ? null : frames.render(messages)));
            }
        } catch (FlrcException e) {
            System.err.println("Error: " + e.getMessage());
            System.exit(3);
        }
    }
}
