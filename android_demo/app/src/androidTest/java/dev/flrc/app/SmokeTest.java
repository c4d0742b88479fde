package dev.flrc.app;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertTrue;
import static org.junit.Assume.assumeTrue;

import android.view.ViewGroup;
import android.webkit.WebView;
import androidx.test.core.app.ActivityScenario;
import androidx.test.ext.junit.runners.AndroidJUnit4;
import androidx.test.platform.app.InstrumentationRegistry;
import dev.flrc.engine.Manifest;
import dev.flrc.engine.Sampling;
import dev.flrc.engine.StagePolicy;
import dev.flrc.engine.decode.Answer;
import dev.flrc.engine.decode.Decoder;
import dev.flrc.engine.decode.StageSessions;
import dev.flrc.engine.tokenizer.Tokenizer;
import java.io.File;
import java.util.concurrent.ArrayBlockingQueue;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.TimeUnit;
import org.junit.Test;
import org.junit.runner.RunWith;

/** On a device: the page comes up and reaches the bridge; a bundle that was pushed answers. */
@RunWith(AndroidJUnit4.class)
public final class SmokeTest {
    private static final String TALKS = "typeof RankBridge + ' ' + typeof window.onEngineEvent";
    private static final int TRIES = 50;
    private static final int TOKENS = 16;

    @Test
    public void thePageReachesTheBridge() throws InterruptedException {
        BlockingQueue<String> answers = new ArrayBlockingQueue<>(1);
        try (ActivityScenario<MainActivity> scenario = ActivityScenario.launch(MainActivity.class)) {
            String answer = null;
            for (int i = 0; i < TRIES && !"\"object function\"".equals(answer); i++) {
                scenario.onActivity(activity -> page(activity).evaluateJavascript(TALKS, answers::offer));
                answer = answers.poll(5, TimeUnit.SECONDS);
                Thread.sleep(100); // the page may still be loading
            }
            assertEquals("\"object function\"", answer);
        }
    }

    @Test
    public void aPushedBundleAnswers() throws Exception {
        File outer = InstrumentationRegistry.getInstrumentation().getTargetContext().getExternalFilesDir(null);
        File[] folders = outer == null ? null : outer.listFiles(File::isDirectory);
        assumeTrue("push a bundle first (README)", folders != null && folders.length > 0);
        File folder = folders[0];
        Manifest manifest = Manifest.verify(folder);
        Tokenizer tokenizer = Tokenizer.open(new File(folder, "tokenizer.json"));
        try (StageSessions sessions = new StageSessions(folder, manifest, 2, 1);
                Decoder decoder = new Decoder(sessions, 128)) {
            int[] prompt = tokenizer.encode("Once upon a time", true);
            StagePolicy policy = StagePolicy.schedule(manifest);
            Answer answer = new Answer(manifest, decoder, tokenizer, prompt, true, Sampling.GREEDY, policy, TOKENS);
            int tokens = 0;
            StringBuilder text = new StringBuilder();
            for (Answer.Token token = answer.next(); token != null; token = answer.next()) {
                text.append(token.text);
                tokens++;
            }
            assertTrue(tokens > 0 && tokens <= TOKENS);
            assertFalse(text.toString().isEmpty());
        }
    }

    private static WebView page(MainActivity activity) {
        ViewGroup content = (ViewGroup) activity.findViewById(android.R.id.content);
        return (WebView) ((ViewGroup) content.getChildAt(0)).getChildAt(0);
    }
}
