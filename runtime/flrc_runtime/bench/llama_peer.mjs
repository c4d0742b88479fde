// llama.cpp's decode loop as a process: llama_peer.mjs GGUF THREADS CONTEXT (peers.py), through node-llama-cpp.
import {existsSync, readFileSync} from "node:fs";
import path from "node:path";
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";

const [gguf, threads, context] = process.argv.slice(2);
const say = (answer) => process.stdout.write(JSON.stringify(answer) + "\n");

// An import would look beside this file; npm installs where the user is.
function packageFolder() {
    for (let folder = process.cwd(); ; folder = path.dirname(folder)) {
        const place = path.join(folder, "node_modules", "node-llama-cpp");
        if (existsSync(place) || folder === path.dirname(folder)) return place;
    }
}

async function main() {
    const folder = packageFolder();
    const {getLlama} = await import(pathToFileURL(path.join(folder, "dist", "index.js")));
    const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: Number(threads)});
    const model = await llama.loadModel({modelPath: gguf, gpuLayers: 0});
    const sequences = await model.createContext({
        contextSize: Number(context), batchSize: 512, threads: Number(threads) || undefined, sequences: 1
    });
    const sequence = sequences.getSequence();
    say({version: JSON.parse(readFileSync(path.join(folder, "package.json"))).version});
    for await (const line of createInterface({input: process.stdin})) {
        const {ids, tokens} = JSON.parse(line);
        await sequence.clearHistory();
        const started = performance.now();
        await sequence.evaluateWithoutGeneratingNewTokens(ids);
        const read = performance.now();
        let made = 0;
        if (tokens > 0)
            for await (const token of sequence.evaluate([ids[0]], {temperature: 0, yieldEogToken: true}))
                if (++made === tokens) break;
        if (made < tokens) throw new Error(`it ended after ${made} of ${tokens} tokens`);
        say({prompt: (read - started) / 1e3, decode: (performance.now() - read) / 1e3});
    }
    process.exit(0);
}

main().catch((error) => {
    say({error: String(error.message ?? error).split("\n")[0]});
    process.exit(1);
});
