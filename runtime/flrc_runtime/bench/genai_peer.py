"""onnxruntime-genai's own decode loop as a process: ``genai_peer.py FOLDER THREADS``, told what to do by genai.py."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

ROOM = 4  # tokens that going back takes, and one to warm up


class Loop:
    """A model and at most one sequence."""

    def __init__(self, folder: str, threads: int) -> None:
        import onnxruntime_genai as og

        self._og, self.version = og, og.__version__
        # As our sessions: threads spin while a graph runs, and sleep when it is another's turn.
        options: dict[str, object] = {"session.force_spinning_stop": "1"}
        if threads:
            options["intra_op_num_threads"] = threads
        config = og.Config(folder)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)
        self._generator: Any = None
        self._start = 0

    def read(self, ids: list[int], tokens: int) -> float:
        """Read a prompt and choose a token; return the seconds."""
        self._start = len(ids)
        length = len(ids) + tokens + ROOM
        params = self._og.GeneratorParams(self._model)
        # min_length keeps end tokens from ending it.
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        self._generator = None  # one sequence's memory at a time
        self._generator = self._og.Generator(self._model, params)
        started = time.perf_counter()
        self._generator.append_tokens(ids)
        self._generator.generate_next_token()  # chosen from the prompt's logits
        return time.perf_counter() - started

    def rewind(self) -> float:
        """Go back to the prompt's end."""
        self._generator.rewind_to(self._start)
        return 0.0

    def run(self, tokens: int) -> float:
        """Make tokens; return the seconds."""
        started = time.perf_counter()
        for _ in range(tokens):
            self._generator.generate_next_token()
        return time.perf_counter() - started

    def end(self) -> float:
        """Free the sequence."""
        self._generator = None
        return 0.0


def main() -> None:
    """Do what is asked until stdin ends."""
    loop = Loop(sys.argv[1], int(sys.argv[2]))
    _say({"version": loop.version})
    for line in sys.stdin:
        question = json.loads(line)
        _say({"seconds": getattr(loop, question.pop("do"))(**question)})


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # the library's errors share no base; genai.py says it in one sentence
        _say({"error": str(error).split("\n")[0]})
        sys.exit(1)
