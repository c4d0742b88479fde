package dev.flrc.engine;

import dev.flrc.engine.decode.AccuracyLevel;
import dev.flrc.engine.decode.Answer;
import dev.flrc.engine.decode.Decoder;
import dev.flrc.engine.decode.StageSessions;
import dev.flrc.engine.tokenizer.Tokenizer;
import java.io.BufferedReader;
import java.io.ByteArrayInputStream;
import java.io.DataOutputStream;
import java.io.File;
import java.io.FileOutputStream;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/** Runs a bundle as JSON lines on stdin ask: {"feed": ids, "stages": […], "out": file} or {"prompt": …}. */
public final class DecoderCheck {
    private DecoderCheck() {
    }

    public static void main(String[] arguments) throws Exception {
        try {
            System.setOut(new PrintStream(System.out, true, "UTF-8"));
            run(new File(arguments[0]), arguments.length > 1 ? Integer.parseInt(arguments[1]) : AccuracyLevel.AS_EXPORTED);
        } catch (FlrcException e) {
            System.err.println("Error: " + e.getMessage());
            System.exit(3);
        }
    }

    private static void run(File folder, int accuracyLevel) throws Exception {
        Manifest manifest = Manifest.verify(folder);
        Tokenizer tokenizer = Tokenizer.open(BundleFiles.resolveInside(folder, "tokenizer.json"));
        try (StageSessions sessions = new StageSessions(folder, manifest, 1, 0, accuracyLevel)) {
            BufferedReader in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
            for (String line = in.readLine(); line != null; line = in.readLine()) {
                byte[] bytes = line.getBytes(StandardCharsets.UTF_8);
                Fields asked = Fields.of(new JsonReader(new ByteArrayInputStream(bytes), "request").value(), "request");
                try (Decoder decoder = new Decoder(sessions, asked.count("context", 2))) {
                    if (asked.has("feed")) {
                        forced(decoder, asked);
                    } else {
                        System.out.println(answer(manifest, decoder, tokenizer, asked));
                    }
                }
            }
        }
    }

    /** Feeds tokens one by one through the stages named for them, and writes all logits. */
    private static void forced(Decoder decoder, Fields asked) throws Exception {
        int[] ids = asked.counts("feed", 0);
        int[] stages = asked.counts("stages", 0);
        try (DataOutputStream out = new DataOutputStream(
            new java.io.BufferedOutputStream(new FileOutputStream(asked.text("out"))))) {
            for (int i = 0; i < ids.length; i++) {
                java.nio.FloatBuffer logits = decoder.step(ids[i], stages[i]);
                for (int j = 0; j < logits.capacity(); j++) {
                    out.writeFloat(logits.get(j));
                }
            }
        }
        System.out.println("{}");
    }

    private static String answer(Manifest manifest, Decoder decoder, Tokenizer tokenizer, Fields asked) throws Exception {
        int[] script = asked.counts("stages", 0);
        Sampling sampling = Sampling.of(asked.real("temperature"), asked.count("top_k", 0), asked.real("top_p"),
            asked.real("repetition_penalty"), asked.whole("seed", 0, Long.MAX_VALUE));
        StagePolicy policy = script.length == 0 ? StagePolicy.schedule(manifest) : StagePolicy.scripted(script);
        Answer answer = new Answer(manifest, decoder, tokenizer, tokenizer.encode(asked.text("prompt"), true), true, sampling,
            policy, asked.count("max_tokens", 1));
        List<Object> ids = new ArrayList<>();
        List<Object> stages = new ArrayList<>();
        StringBuilder text = new StringBuilder();
        String reason = null;
        for (Answer.Token token = answer.next(); token != null; token = answer.next()) {
            ids.add(token.id);
            stages.add(token.stage);
            text.append(token.text);
            reason = token.finishReason;
        }
        Map<String, Object> result = new LinkedHashMap<>();
        result.put("ids", ids);
        result.put("stages", stages);
        result.put("text", text);
        result.put("reason", reason);
        return JsonText.of(result);
    }
}
