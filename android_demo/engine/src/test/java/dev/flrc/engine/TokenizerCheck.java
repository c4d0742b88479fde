package dev.flrc.engine;

import dev.flrc.engine.tokenizer.Tokenizer;
import java.io.BufferedReader;
import java.io.ByteArrayInputStream;
import java.io.File;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/** Answers a JSON string with its ids and a JSON list of ids with its text, a line each; see tests/android. */
public final class TokenizerCheck {
    private TokenizerCheck() {
    }

    public static void main(String[] arguments) throws Exception {
        PrintStream out = new PrintStream(System.out, false, "UTF-8");
        Tokenizer tokenizer;
        try {
            tokenizer = Tokenizer.open(new File(arguments[0]));
        } catch (FlrcException e) {
            System.err.println("Error: " + e.getMessage());
            System.exit(3);
            return;
        }
        BufferedReader in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        for (String line = in.readLine(); line != null; line = in.readLine()) {
            byte[] bytes = line.getBytes(StandardCharsets.UTF_8);
            Object asked = new JsonReader(new ByteArrayInputStream(bytes), "the request").value();
            Map<String, Object> answer = new LinkedHashMap<>();
            if (asked instanceof String) {
                answer.put("ids", tokenizer.encode((String) asked, false));
                answer.put("special", tokenizer.encode((String) asked, true));
            } else {
                answer.put("text", tokenizer.decode(ids((List<?>) asked)));
            }
            out.println(JsonText.of(answer));
        }
        out.flush();
    }

    private static int[] ids(List<?> values) {
        int[] result = new int[values.size()];
        for (int i = 0; i < result.length; i++) {
            result[i] = ((Long) values.get(i)).intValue();
        }
        return result;
    }
}
