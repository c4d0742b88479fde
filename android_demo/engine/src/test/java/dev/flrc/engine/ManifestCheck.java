package dev.flrc.engine;

import java.io.File;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/** Verifies the bundle in a folder and prints what it is as JSON; exit code 3 and one sentence if it is refused. */
public final class ManifestCheck {
    private ManifestCheck() {
    }

    public static void main(String[] arguments) {
        try {
            Manifest manifest = Manifest.verify(new File(arguments[0]));
            Map<String, Object> found = new LinkedHashMap<>();
            found.put("model", manifest.model);
            found.put("dtype", manifest.dtype);
            found.put("operators", manifest.operators);
            found.put("bytes", manifest.size());
            found.put("boundaries", manifest.boundaries);
            List<Object> stages = new ArrayList<>();
            for (Manifest.Stage stage : manifest.stages) {
                stages.add(stage.graph);
            }
            found.put("stages", stages);
            List<Integer> at = new ArrayList<>();
            for (int i = 0; i < 100; i++) {
                at.add(manifest.stageAt(i));
            }
            found.put("stage_at", at);
            System.out.println(JsonText.of(found));
        } catch (FlrcException e) {
            System.err.println("Error: " + e.getMessage());
            System.exit(3);
        }
    }
}
