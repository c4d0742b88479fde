package dev.flrc.app;

import android.app.Activity;
import android.content.ActivityNotFoundException;
import android.content.Intent;
import android.os.Bundle;
import android.os.Handler;
import android.os.Looper;
import android.view.WindowManager;
import android.webkit.JavascriptInterface;
import android.webkit.WebView;
import android.webkit.WebViewClient;
import android.widget.FrameLayout;
import dev.flrc.engine.FlrcException;
import dev.flrc.engine.JsonText;
import dev.flrc.engine.decode.LibraryService;
import dev.flrc.engine.library.FolderSource;
import java.io.File;
import java.util.LinkedHashMap;
import java.util.Map;

/** The page and the engine, and what only the device can do for them: pick a folder, stay awake, tell its battery. */
public final class MainActivity extends Activity {
    private static final String PAGE = "file:///android_asset/ui/index.html";
    private static final int PICK = 1;
    private static final long SIGNALS_MS = 5000;

    private final Handler main = new Handler(Looper.getMainLooper());
    private final Runnable signals = this::tellSignals;
    private DeviceSignals device;
    private LibraryService library;
    private WebView page;

    @Override
    @SuppressWarnings("SetJavaScriptEnabled") // the page is the app's own
    protected void onCreate(Bundle state) {
        super.onCreate(state);
        device = new DeviceSignals(this);
        page = new WebView(this);
        page.getSettings().setJavaScriptEnabled(true);
        page.getSettings().setDomStorageEnabled(true); // settings of the page
        page.getSettings().setAllowContentAccess(false);
        page.addJavascriptInterface(new RankBridge(), "RankBridge");
        page.setWebViewClient(new WebViewClient() {
            @Override
            @SuppressWarnings("deprecation") // its successor, which calls it, is not in API level 23
            public boolean shouldOverrideUrlLoading(WebView view, String address) {
                return true; // no other page
            }
        });
        FrameLayout frame = new FrameLayout(this);
        frame.setFitsSystemWindows(true); // Android 15 draws behind the bars otherwise
        frame.addView(page);
        setContentView(frame);
        page.loadUrl(PAGE);
    }

    @Override
    protected void onStart() {
        super.onStart();
        main.post(signals);
    }

    @Override
    protected void onStop() {
        main.removeCallbacks(signals);
        post("stop");
        super.onStop();
    }

    @Override
    public void onTrimMemory(int level) {
        super.onTrimMemory(level);
        if (level >= TRIM_MEMORY_BACKGROUND) { // the page opens the bundle again
            post("close");
        }
    }

    @Override
    protected void onDestroy() {
        page.removeJavascriptInterface("RankBridge");
        page.destroy();
        page = null;
        final LibraryService ended = library;
        library = null;
        if (ended != null) {
            new Thread(ended::close, "release").start(); // it waits for the token that is being computed
        }
        super.onDestroy();
    }

    @Override
    protected void onActivityResult(int request, int result, Intent data) {
        if (request == PICK && result == RESULT_OK && data != null && data.getData() != null && opened()) {
            PickedFolder folder = new PickedFolder(getContentResolver(), data.getData());
            library.add(folder.name(), folder);
        }
    }

    /** What the page calls, on a thread of the WebView. */
    private final class RankBridge {
        /** Takes a command of the library and the engine. */
        @JavascriptInterface
        public void post(String json) {
            main.post(() -> {
                if (opened()) {
                    library.command(json);
                }
            });
        }

        /** Lets the user pick the folder of a bundle. */
        @JavascriptInterface
        public void pick() {
            main.post(MainActivity.this::pickFolder);
        }

        /** Imports what {@code adb push} put into the app's outer folder. */
        @JavascriptInterface
        public void importPushed() {
            main.post(MainActivity.this::addPushed);
        }

        /** Keeps the screen on, or no longer. */
        @JavascriptInterface
        public void awake(boolean on) {
            main.post(() -> {
                if (on) {
                    getWindow().addFlags(WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON);
                } else {
                    getWindow().clearFlags(WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON);
                }
            });
        }
    }

    /** Opens the library at the page's first command: a failure can be shown then. */
    private boolean opened() {
        if (library == null && page != null) {
            try {
                library = new LibraryService(new File(getFilesDir(), "bundles"), json -> main.post(() -> show(json)));
            } catch (FlrcException e) {
                fail(e.getMessage(), e.hint());
            }
        }
        return library != null;
    }

    private void pickFolder() {
        try {
            startActivityForResult(new Intent(Intent.ACTION_OPEN_DOCUMENT_TREE), PICK);
        } catch (ActivityNotFoundException e) {
            fail("this device has no picker of folders", "push the bundle with adb instead");
        }
    }

    private void addPushed() {
        File outer = getExternalFilesDir(null);
        File[] folders = outer == null ? null : outer.listFiles(File::isDirectory);
        if (folders == null || folders.length == 0) {
            fail("nothing was pushed", "adb push BUNDLE /sdcard/Android/data/" + getPackageName() + "/files/");
        } else if (opened()) {
            for (File folder : folders) {
                library.add(folder.getName(), new FolderSource(folder));
            }
        }
    }

    private void tellSignals() {
        show(device.event());
        main.postDelayed(signals, SIGNALS_MS);
    }

    private void post(String type) {
        if (library != null) {
            library.command("{\"type\":\"" + type + "\"}");
        }
    }

    private void fail(String message, String hint) {
        Map<String, Object> event = new LinkedHashMap<>();
        event.put("type", "import_error");
        event.put("message", message);
        event.put("hint", hint);
        show(JsonText.of(event));
    }

    private void show(String json) {
        if (page != null) { // JsonText leaves nothing in a string that a script would read otherwise
            page.evaluateJavascript("window.onEngineEvent && window.onEngineEvent(" + json + ")", null);
        }
    }
}
