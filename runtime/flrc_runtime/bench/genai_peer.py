"""onnxruntime-genai's own decode loop as a process: ``genai_peer.py FOLDER THREADS CONTEXT`` (peers.py)."""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> None:
    """Answer questions until stdin ends."""
    import onnxruntime_genai as og

    folder, threads = sys.argv[1], int(sys.argv[2])
    config = og.Config(folder)
    if threads:
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
    model = og.Model(config)
    _say({"version": og.__version__})
    for line in sys.stdin:
        question = json.loads(line)
        _say(measure(og, model, question["ids"], question["tokens"]))


def measure(og: Any, model: Any, ids: list[int], tokens: int) -> dict[str, float]:
    """Return the seconds of the prompt and of the tokens after it."""
    length = len(ids) + tokens + 2
    params = og.GeneratorParams(model)
    # min_length keeps end tokens from ending it.
    params.set_search_options(do_sample=False, max_length=length, min_length=length)
    generator = og.Generator(model, params)
    started = time.perf_counter()
    generator.append_tokens(ids)
    generator.generate_next_token()  # chosen from the prompt's logits
    read = time.perf_counter()
    for _ in range(tokens):
        generator.generate_next_token()
    return {"prompt": read - started, "decode": time.perf_counter() - read}


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # the libraries' errors share no base; peers.py says it in one sentence
        _say({"error": str(error).split("\n")[0]})
        sys.exit(1)
