"""The app's page in a browser, with the real engine behind it: ``make android-preview BUNDLE=folder``.

A stand-in for the app's bridge: what the page posts goes to the engine's stdin, a line each, and the engine's events go
to the page. One page at a time; 127.0.0.1 only.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fetch_tools import JAR, fetch, java_environment

DEMO = Path(__file__).parents[1]
PAGE = DEMO / "app" / "src" / "main" / "assets" / "ui"
MAX_COMMAND = 1 << 20  # bytes


class Engine:
    """The engine's process; its events go to the page that came last."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        self._page: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, line: str) -> None:
        """Pass one command on."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.replace("\n", " ") + "\n")
        self._process.stdin.flush()

    def events(self) -> Iterator[str]:
        """Yield events until the engine ends or another page comes."""
        self._page.put(None)
        mine: queue.Queue[str | None] = queue.Queue()
        self._page = mine
        while (event := mine.get()) is not None:
            yield event

    def close(self) -> None:
        """Let the engine end by itself."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._page.put(line.rstrip("\n"))
        self._page.put(None)


class Bridge(SimpleHTTPRequestHandler):
    """Files of the page, commands and events."""

    def __init__(self, *arguments: Any, engine: Engine, opening: str) -> None:
        self.engine, self.opening = engine, opening
        super().__init__(*arguments, directory=str(PAGE))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """Take a command."""
        size = int(self.headers.get("Content-Length", 0))
        allowed = self.path == "/command" and size <= MAX_COMMAND and self._own_page()
        if allowed:
            self.engine.send(self.rfile.read(size).decode("utf-8", "replace"))
        self.send_response(204 if allowed else 400)
        self.end_headers()

    def do_GET(self) -> None:
        """Give a file, or the events as they come."""
        if self.path != "/events":
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        events = self.engine.events()
        self.engine.send(self.opening)
        for event in events:
            self.wfile.write(f"data: {event}\n\n".encode())
            self.wfile.flush()

    def _own_page(self) -> bool:
        """Refuse other pages of the browser, which could reach this port."""
        host = self.headers.get("Host", "")
        return self.headers.get("Origin", f"http://{host}") == f"http://{host}" and host.startswith(
            "127.0.0.1:"
        )


def compiled(tools: Path, folder: Path) -> Path:
    """Compile engine and host into a folder."""
    sources = [
        str(p) for part in ("engine/src/main", "desktop/src/main") for p in (DEMO / part).rglob("*.java")
    ]
    command = ["javac", "--release", "11", "-cp", str(tools / JAR), "-d", str(folder), *sources]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return folder


def main() -> None:
    """Serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument(
        "--context", type=int, help="tokens of a conversation; the model's, at most 2048, by default"
    )
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    tools = fetch()
    with tempfile.TemporaryDirectory() as scratch:
        classes = compiled(tools, Path(scratch) / "classes")
        path = os.pathsep.join((str(classes), str(tools / JAR)))
        java = ["java", "-cp", path, f"-Donnxruntime.native.path={tools}", "dev.flrc.desktop.HostMain"]
        java.append(str(Path(scratch) / "library"))  # of the bundles that the page imports, while this runs
        engine = Engine(java, java_environment(tools))
        opening: dict[str, object] = {
            "type": "open",
            "folder": str(given.bundle.resolve()),
            "threads": given.threads,
        }
        if given.context is not None:
            opening["context"] = given.context
        handler = partial(Bridge, engine=engine, opening=json.dumps(opening))
        server = ThreadingHTTPServer(("127.0.0.1", given.port), handler)
        server.daemon_threads = True
        print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            engine.close()


if __name__ == "__main__":
    main()
