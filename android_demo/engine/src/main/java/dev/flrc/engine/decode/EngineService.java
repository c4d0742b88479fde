package dev.flrc.engine.decode;

import dev.flrc.engine.BundleFiles;
import dev.flrc.engine.ChatFrames;
import dev.flrc.engine.Cheapest;
import dev.flrc.engine.Fields;
import dev.flrc.engine.FlrcException;
import dev.flrc.engine.JsonReader;
import dev.flrc.engine.JsonText;
import dev.flrc.engine.LatencyBudget;
import dev.flrc.engine.Manifest;
import dev.flrc.engine.MeanBudget;
import dev.flrc.engine.Sampling;
import dev.flrc.engine.SignalStages;
import dev.flrc.engine.StagePolicy;
import dev.flrc.engine.tokenizer.Tokenizer;
import java.io.ByteArrayInputStream;
import java.io.File;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;

/**
 * The engine behind JSON commands and events, one user at a time; the app's page and the desktop's host both speak it.
 *
 * <p>Commands: {@code {"type":"open","folder":…,"context":…,"threads":…,"resident":…,"accuracy_level":…}}, {@code
 * {"type":"ask","text":…,"max_tokens":…,"temperature":…,"top_k":…,"top_p":…,"repetition_penalty":…,"seed":…}}, {@code {"type":"stage","stage":…}} (null: the
 * bundle's policy), {@code {"type":"policy","ms":…,"mean":…,"thresholds":[…],"hysteresis":…}} (any of them; none: the
 * bundle's schedule), {@code {"type":"signal","value":…}} (what the thresholds are compared with, such as the battery's
 * charge), {@code {"type":"stop"}}, {@code {"type":"reset","system":…}}, {@code {"type":"close"}}.
 *
 * <p>Events: {@code opened}, {@code token}, {@code done}, {@code closed}, {@code reset}, {@code policy} and {@code error}
 * with a message and a hint. {@code stage}, {@code signal} and {@code stop} take effect at the next token; all others wait
 * for their turn.
 */
public final class EngineService implements AutoCloseable {
    /** Takes events, each a line of JSON, from the engine's thread. */
    public interface Events {
        void event(String json);

        /** Told on the engine's thread that a bundle begins to load. */
        default void loading(File folder) {
        }

        /** Told that loading it ended, well or with an error. */
        default void loaded(File folder, boolean opened) {
        }
    }

    private static final int DEFAULT_CONTEXT = 2048;

    private final Events events;
    private final ExecutorService worker = Executors.newSingleThreadExecutor();
    private volatile int chosenStage = -1; // -1: the policy
    private volatile double signal = Double.NaN; // nothing is known
    private StagePolicy policy;
    private volatile int questions; // asked so far; written by the thread of the commands
    private volatile int stopped; // questions up to this one end
    private Manifest manifest;
    private StageSessions sessions;
    private Decoder decoder;
    private Conversation conversation;

    public EngineService(Events events) {
        this.events = events;
    }

    /** Takes a command; returns at once. */
    public void command(String json) {
        final Fields asked;
        final String type;
        try {
            byte[] bytes = json.getBytes(StandardCharsets.UTF_8);
            asked = Fields.of(new JsonReader(new ByteArrayInputStream(bytes), "the command").value(), "the command");
            type = asked.text("type");
            if (type.equals("stop")) {
                stopped = questions;
                return;
            }
            if (type.equals("stage")) {
                chosenStage = asked.has("stage") ? asked.count("stage", 0) : -1;
                return;
            }
            if (type.equals("signal")) {
                signal = asked.has("value") ? asked.real("value") : Double.NaN;
                return;
            }
        } catch (FlrcException e) {
            error(e.getMessage(), e.hint());
            return;
        }
        if (type.equals("ask")) {
            questions = questions + 1;
        }
        final int question = questions;
        worker.execute(() -> {
            try {
                run(type, asked, question);
            } catch (FlrcException e) {
                error(e.getMessage(), e.hint());
            } catch (OutOfMemoryError e) {
                error("there is not enough memory", "choose a shorter context or a smaller bundle");
            } catch (RuntimeException e) {
                error("the engine failed: " + e, "this is a fault of the engine; please report it");
            }
        });
    }

    private void run(String type, Fields asked, int question) throws FlrcException {
        switch (type) {
            case "open":
                open(asked);
                break;
            case "ask":
                ask(asked, question);
                break;
            case "policy":
                needed();
                policy = policy(asked);
                send("policy", new LinkedHashMap<>());
                break;
            case "reset":
                needed().reset(asked.has("system") ? asked.text("system") : null);
                send("reset", new LinkedHashMap<>());
                break;
            case "close":
                release();
                send("closed", new LinkedHashMap<>());
                break;
            default:
                throw new FlrcException("there is no command '" + type + "'");
        }
    }

    private void open(Fields asked) throws FlrcException {
        release();
        File folder = new File(asked.text("folder"));
        Map<String, Object> event = null;
        events.loading(folder);
        try {
            event = open(folder, asked);
        } finally {
            events.loaded(folder, event != null);
        }
        send("opened", event);
    }

    private Map<String, Object> open(File folder, Fields asked) throws FlrcException {
        chosenStage = -1;
        long begun = System.nanoTime();
        Manifest found = Manifest.verify(folder);
        Tokenizer tokenizer = Tokenizer.open(BundleFiles.resolveInside(folder, "tokenizer.json"));
        ChatFrames frames = ChatFrames.open(folder, found);
        int context = asked.has("context") ? asked.count("context", 2) : Math.min(found.contextLength, DEFAULT_CONTEXT);
        try {
            int threads = asked.has("threads") ? asked.count("threads", 0) : 0;
            // Own operators read the mapped file: then all stages together take the memory of one.
            int resident = asked.has("resident") ? asked.count("resident", 0) : found.operators == 0 ? 1 : 0;
            int level = asked.has("accuracy_level") ? asked.count("accuracy_level", 0) : AccuracyLevel.AS_EXPORTED;
            sessions = new StageSessions(folder, found, threads, resident, level);
            sessions.get(0);
            decoder = new Decoder(sessions, context);
        } catch (FlrcException e) {
            release();
            throw e;
        }
        manifest = found;
        policy = StagePolicy.schedule(found);
        conversation = new Conversation(found, decoder, tokenizer, frames);
        Map<String, Object> event = new LinkedHashMap<>();
        event.put("model", found.model);
        event.put("dtype", found.dtype);
        event.put("bytes", found.size());
        event.put("context", context);
        event.put("chat", frames != null);
        event.put("boundaries", found.boundaries);
        List<Object> stages = new ArrayList<>();
        for (Manifest.Stage stage : found.stages) {
            Map<String, Object> one = new LinkedHashMap<>();
            one.put("keep", stage.keep);
            one.put("bytes", stage.bytes);
            stages.add(one);
        }
        event.put("stages", stages);
        event.put("ms", milliseconds(begun));
        return event;
    }

    private void ask(Fields asked, int question) throws FlrcException {
        Conversation talk = needed();
        Sampling sampling = Sampling.of(
            asked.has("temperature") ? asked.real("temperature") : 0,
            asked.has("top_k") ? asked.count("top_k", 0) : 0,
            asked.has("top_p") ? asked.real("top_p") : 1,
            asked.has("repetition_penalty") ? asked.real("repetition_penalty") : 1,
            asked.has("seed") ? asked.whole("seed", 0, Long.MAX_VALUE) : System.nanoTime() & Long.MAX_VALUE);
        int most = asked.has("max_tokens") ? asked.count("max_tokens", 1) : 256;
        long begun = System.nanoTime();
        Answer answer = talk.ask(asked.text("text"), sampling, chosen(), most);
        double first = 0;
        double busy = 0;
        int count = 0;
        String reason = "stopped";
        try {
            while (question > stopped) {
                Answer.Token token = answer.next();
                talk.heard(token);
                if (count++ == 0) {
                    first = milliseconds(begun);
                } else {
                    busy += token.milliseconds;
                }
                Map<String, Object> event = new LinkedHashMap<>();
                event.put("text", token.text);
                event.put("stage", token.stage);
                event.put("ms", round(token.milliseconds));
                send("token", event);
                if (token.finishReason != null) {
                    reason = token.finishReason;
                    break;
                }
            }
        } finally {
            talk.ended();
        }
        Map<String, Object> event = new LinkedHashMap<>();
        event.put("reason", reason);
        event.put("tokens", count);
        event.put("reused", talk.reused());
        event.put("position", decoder.length());
        event.put("first_ms", round(first));
        event.put("tokens_per_second", busy > 0 ? round(1e3 * (count - 1) / busy) : 0);
        event.put("open_stages", sessions.openCount());
        send("done", event);
    }

    /** The stage that was chosen last, else the policy's. */
    private StagePolicy chosen() {
        final StagePolicy now = policy;
        final int last = manifest.stages.size() - 1;
        return new StagePolicy() {
            @Override
            public int next(int generated, int stage, double lastMs) {
                int wanted = now.next(generated, stage, lastMs);
                return Math.min(chosenStage < 0 ? wanted : chosenStage, last);
            }

            @Override
            public int promptStage() {
                return now.promptStage();
            }
        };
    }

    private StagePolicy policy(Fields asked) throws FlrcException {
        List<StagePolicy> all = new ArrayList<>();
        if (asked.has("ms")) {
            all.add(new LatencyBudget(asked.real("ms"), manifest.stages.size()));
        }
        if (asked.has("mean")) {
            double[] kept = new double[manifest.stages.size()];
            for (int i = 0; i < kept.length; i++) {
                kept[i] = manifest.stages.get(i).keep;
            }
            all.add(new MeanBudget(asked.real("mean"), kept));
        }
        if (asked.has("thresholds")) {
            double hysteresis = asked.has("hysteresis") ? asked.real("hysteresis") : 0;
            all.add(new SignalStages(() -> signal, hysteresis, asked.reals("thresholds")));
        }
        return all.isEmpty() ? StagePolicy.schedule(manifest) : new Cheapest(all.toArray(new StagePolicy[0]));
    }

    private Conversation needed() throws FlrcException {
        if (conversation == null) {
            throw new FlrcException("no bundle is open", "open one first");
        }
        return conversation;
    }

    private void release() throws FlrcException {
        conversation = null;
        manifest = null;
        if (decoder != null) {
            decoder.close();
            decoder = null;
        }
        if (sessions != null) {
            sessions.close();
            sessions = null;
        }
    }

    private void error(String message, String hint) {
        Map<String, Object> event = new LinkedHashMap<>();
        event.put("message", message);
        event.put("hint", hint);
        send("error", event);
    }

    private void send(String type, Map<String, Object> fields) {
        Map<String, Object> event = new LinkedHashMap<>();
        event.put("type", type);
        event.putAll(fields);
        events.event(JsonText.of(event));
    }

    private static double milliseconds(long begun) {
        return round((System.nanoTime() - begun) / 1e6);
    }

    private static double round(double value) {
        return Math.round(value * 100) / 100.0;
    }

    /** Ends an answer that runs, waits for it and frees the bundle. */
    @Override
    public void close() {
        stopped = questions;
        command("{\"type\":\"close\"}");
        worker.shutdown();
        try {
            worker.awaitTermination(1, java.util.concurrent.TimeUnit.MINUTES);
        } catch (InterruptedException e) {
            Thread.currentThread().interrupt();
        }
    }
}
