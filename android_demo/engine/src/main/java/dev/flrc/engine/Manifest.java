package dev.flrc.engine;

import java.io.File;
import java.util.ArrayList;
import java.util.Collections;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/**
 * What a bundle's {@code flrc.json} says that decoding needs (docs/format.md); the ranks of every projection are not.
 *
 * <p>{@link #read} and {@link #verify} refuse what the Python runtime refuses.
 */
public final class Manifest {
    /** The first and the last version of the format that this engine reads: the first has no operators of our own. */
    static final int OLDEST_SCHEMA = 2;
    static final int SCHEMA_VERSION = 3;
    static final String FILE_NAME = "flrc.json";
    static final String CARD = "README.md";
    static final int MAX_STAGES = 64;

    /** One exported stage. */
    public static final class Stage {
        /** File of its graph. */
        public final String graph;
        /** Share of the projections' parameters that it reads. */
        public final double keep;
        /** Bytes of weights that a token reads. */
        public final long bytes;

        Stage(String graph, double keep, long bytes) {
            this.graph = graph;
            this.keep = keep;
            this.bytes = bytes;
        }
    }

    /** Size and hash of a file. */
    static final class Listed {
        final long size;
        final String sha256;

        Listed(long size, String sha256) {
            this.size = size;
            this.sha256 = sha256;
        }
    }

    /** Name of the original model. */
    public final String model;
    public final int vocabSize;
    public final int numLayers;
    public final int numKvHeads;
    public final int headDim;
    /** Tokens of prompt and answer together, at most. */
    public final int contextLength;
    /** Tokens that end an answer. */
    public final int[] eosTokenIds;
    /** Parameters of the original model. */
    public final long parameters;
    /** Number format of the projections. */
    public final String dtype;
    public final List<Stage> stages;
    /** Version of our own operators that the graphs consist of; 0: onnxruntime's. */
    public final int operators;
    /** Number of answer tokens at which decoding moves on; one less than there are stages. */
    public final int[] boundaries;
    final Map<String, Listed> files;

    private Manifest(Fields raw) throws FormatException {
        Fields about = raw.object("model");
        about.only("name", "architecture", "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads",
            "head_dim", "context_length", "eos_token_ids", "parameters");
        model = about.text("name");
        vocabSize = about.count("vocab_size", 1);
        numLayers = about.count("num_layers", 1);
        numKvHeads = about.count("num_kv_heads", 1);
        headDim = about.count("head_dim", 1);
        contextLength = about.count("context_length", 1);
        parameters = about.whole("parameters", 1, Long.MAX_VALUE);
        eosTokenIds = about.counts("eos_token_ids", 0);
        for (int id : eosTokenIds) {
            if (id >= vocabSize) {
                throw new FormatException(FILE_NAME + ": model.eos_token_ids must lie inside the vocabulary");
            }
        }
        dtype = raw.text("dtype");
        List<Stage> found = new ArrayList<>();
        for (Fields stage : raw.objects("stages")) {
            stage.only("graph", "keep", "bytes");
            double keep = stage.real("keep");
            if (!(keep > 0)) {
                throw new FormatException(FILE_NAME + ": stage " + stage.text("graph") + ": keep must be positive");
            }
            found.add(new Stage(stage.text("graph"), keep, stage.whole("bytes", 1, Long.MAX_VALUE)));
        }
        if (found.isEmpty() || found.size() > MAX_STAGES) {
            throw new FormatException(FILE_NAME + ": a bundle has 1 to " + MAX_STAGES + " stages");
        }
        stages = Collections.unmodifiableList(found);
        operators = raw.count("operators", 0, 0);
        boundaries = raw.object("schedule").counts("boundaries", 1);
        if (boundaries.length != stages.size() - 1) {
            throw new FormatException(
                FILE_NAME + ": " + stages.size() + " stages need " + (stages.size() - 1) + " schedule boundaries");
        }
        for (int i = 1; i < boundaries.length; i++) {
            if (boundaries[i] < boundaries[i - 1]) {
                throw new FormatException(FILE_NAME + ": schedule.boundaries must not fall");
            }
        }
        files = new LinkedHashMap<>();
        for (Map.Entry<String, Fields> entry : raw.object("files").named().entrySet()) {
            Fields file = entry.getValue();
            file.only("size", "sha256");
            if (!entry.getKey().equals(CARD)) { // people edit the card
                files.put(entry.getKey(), new Listed(file.whole("size", 0, Long.MAX_VALUE), file.text("sha256")));
            }
        }
    }

    /**
     * Reads the manifest and checks that every file it names is there with its size.
     *
     * @throws FormatException it is missing, damaged, of another version or not of a bundle
     * @throws VerificationException a file is missing or has another size
     */
    public static Manifest read(File folder) throws FormatException, VerificationException {
        String name = folder.getName();
        Manifest manifest = parsed(folder);
        for (Map.Entry<String, Listed> entry : manifest.files.entrySet()) {
            long size = BundleFiles.resolveInside(folder, entry.getKey()).length();
            if (size != entry.getValue().size) {
                throw new VerificationException(name + ": " + entry.getKey() + " has " + size + " bytes, "
                    + entry.getValue().size + " were written", "copy the bundle again");
            }
        }
        return manifest;
    }

    /**
     * Reads the manifest alone: sizes of the files (bytes) by name, the model card left out, there or not.
     *
     * @throws FormatException see {@link #read}
     */
    public static Map<String, Long> listed(File folder) throws FormatException {
        Map<String, Long> sizes = new LinkedHashMap<>();
        for (Map.Entry<String, Listed> entry : parsed(folder).files.entrySet()) {
            sizes.put(entry.getKey(), entry.getValue().size);
        }
        return sizes;
    }

    private static Manifest parsed(File folder) throws FormatException {
        String name = folder.getName();
        if (!folder.isDirectory()) {
            throw new FormatException(name + " is not a folder", "give the folder that flrc-edge export wrote");
        }
        if (java.nio.file.Files.isSymbolicLink(new File(folder, FILE_NAME).toPath())) {
            throw new FormatException(name + ": " + FILE_NAME + " is a link");
        }
        Fields raw = Fields.of(BundleFiles.readJson(new File(folder, FILE_NAME)), FILE_NAME);
        int schema = raw.count("schema_version", 0);
        if (schema < OLDEST_SCHEMA || schema > SCHEMA_VERSION) {
            throw new FormatException(name + " was written in format " + schema + ", this engine reads " + OLDEST_SCHEMA
                + " and " + SCHEMA_VERSION, "export the bundle with this version of flrc-edge");
        }
        raw.only("kind", "model", "plan", "schedule", "dtype", "factorization", "calibration", "stages", "operators",
            "versions", "files", "schema_version");
        if (!raw.text("kind").equals("bundle")) {
            throw new FormatException(name + " is a " + raw.text("kind") + ", not a bundle",
                "flrc-edge export writes a bundle");
        }
        Manifest manifest = new Manifest(raw);
        for (String needed : manifest.required()) {
            if (!manifest.files.containsKey(needed)) {
                throw new FormatException(name + ": " + FILE_NAME + " does not list " + needed);
            }
        }
        return manifest;
    }

    /**
     * Reads the manifest and compares the SHA-256 of every file.
     *
     * @throws FormatException see {@link #read}
     * @throws VerificationException a file is missing, differs or is not listed
     */
    public static Manifest verify(File folder) throws FormatException, VerificationException {
        Manifest manifest = read(folder);
        File[] there = folder.listFiles();
        for (File file : there == null ? new File[0] : there) {
            String name = file.getName();
            if (!name.equals(FILE_NAME) && !name.equals(CARD) && !manifest.files.containsKey(name)) {
                throw new VerificationException(folder.getName() + ": " + name + " is not listed in " + FILE_NAME);
            }
        }
        for (Map.Entry<String, Listed> entry : manifest.files.entrySet()) {
            File file = BundleFiles.resolveInside(folder, entry.getKey());
            if (!BundleFiles.sha256(file).equals(entry.getValue().sha256)) {
                throw new VerificationException(
                    folder.getName() + ": checksum mismatch in " + entry.getKey(), "copy the bundle again");
            }
        }
        long weightBytes = manifest.files.get(GraphFile.WEIGHTS).size;
        for (Stage stage : manifest.stages) {
            GraphFile.check(BundleFiles.resolveInside(folder, stage.graph), weightBytes, manifest.operators != 0);
        }
        return manifest;
    }

    /** The stage that computes the answer token with this index, counted from 0. */
    public int stageAt(int generated) {
        int stage = 0;
        while (stage < boundaries.length && boundaries[stage] <= generated) {
            stage++;
        }
        return stage;
    }

    /** Bytes of all files. */
    public long size() {
        long total = 0;
        for (Listed file : files.values()) {
            total += file.size;
        }
        return total;
    }

    private List<String> required() {
        List<String> names = new ArrayList<>();
        for (Stage stage : stages) {
            names.add(stage.graph);
        }
        Collections.addAll(names, "weights.bin", "tokenizer.json", "tokenizer_config.json");
        return names;
    }
}
