"""A process with everything imported that forks one command line at a time and kills it when it is told to.

Reads requests, a JSON line each, and answers each with a line: the exit code, seconds, what was logged and the count of
file operations. A fresh interpreter would spend most of its life importing torch.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # no threads: what is forked has none

import torch
import transformers  # noqa: F401

import flrc_edge.cli
import flrc_edge.cli.compress
import flrc_edge.cli.export
import flrc_edge.compression
import flrc_edge.models
import flrc_exporters.bundle  # noqa: F401
from tests.faults.injection import Injection, install

install()
torch.set_num_threads(1)


def child(request: dict[str, Any], out: Path) -> int:
    """Run the command line; what it logs goes to the file."""
    # A shell gives its background jobs SIGINT to ignore, and this process may be of one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["FLRC_EDGE_CACHE"] = request["cache"]
    if request["room"] is not None:
        limit_memory(request["room"])
    with out.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    injection = Injection(request["fail"], Path(request["watched"]))
    with injection:
        code = flrc_edge.cli.run(request["arguments"])
    sys.stderr.flush()
    sys.stdout.flush()
    out.with_suffix(".operations").write_text(str(injection.count))
    return code


def limit_memory(room: int) -> None:
    """Let this process map at most ``room`` bytes more than it has."""
    kilobytes = re.search(r"VmSize:\s*(\d+)", Path("/proc/self/status").read_text())
    assert kilobytes is not None
    resource.setrlimit(resource.RLIMIT_AS, (1024 * int(kilobytes[1]) + room,) * 2)


def kill(pid: int, number: int) -> None:
    """Send a signal, unless the process has ended by itself."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_after(pid: int, number: int, words: str, out: Path) -> None:
    """Send a signal as soon as the process has said these words."""
    while not (out.exists() and words in out.read_text()):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.002)
    kill(pid, number)


def serve(model: str) -> None:
    """Answer requests until stdin ends.

    Args:
        model: Loaded once, so that all that loading imports is there.
    """
    flrc_edge.models.open_model(model)
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        out = Path(request["scratch"]) / f"{number}.log"
        begun = time.monotonic()
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = child(request, out)
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except BaseException as error:
                print(f"died of {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        timer = None
        if request["delay"] is not None:
            timer = threading.Timer(request["delay"], kill, (pid, request["signal"]))
            timer.start()
        if request["after"] is not None:
            arguments = (pid, request["signal"], request["after"], out)
            threading.Thread(target=kill_after, args=arguments, daemon=True).start()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if timer is not None:
            timer.cancel()
        operations = out.with_suffix(".operations")
        answer = {
            "status": status,
            "seconds": time.monotonic() - begun,
            "log": out.read_text() if out.exists() else "",
            "operations": int(operations.read_text()) if operations.exists() else None,
        }
        sys.__stdout__.write(json.dumps(answer) + "\n")  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]


if __name__ == "__main__":
    serve(sys.argv[1])
