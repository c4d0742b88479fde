"""What is fuzzed: every reader of something that a stranger may have written. Only errors of ours may come out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flrc_runtime import files, manifest
from flrc_runtime.chat_template import ChatTemplate
from flrc_runtime.errors import FlrcError
from flrc_runtime.graph_file import KNOWN, check_graph_file
from flrc_runtime.server.errors import ApiError
from flrc_runtime.server.requests import chat_request, completion_request, parse_body

CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "?"},
]
_folder = Path(tempfile.mkdtemp(prefix="flrc-edge-fuzz-"))
_bundle = _folder / "bundle"
_bundle.mkdir()


def fuzz_manifest(data: bytes) -> None:
    """``flrc.json``, as far as it can be read without the files that it lists."""
    (_bundle / "flrc.json").write_bytes(data)
    manifest.parse(_bundle)


def fuzz_json(data: bytes) -> None:
    """Any other JSON file of a folder."""
    (_folder / "any.json").write_bytes(data)
    files.read_json(_folder / "any.json")


def fuzz_name(data: bytes) -> None:
    """The name of a file in a manifest: what is accepted lies in the folder."""
    name = data.decode("utf-8", "surrogateescape")
    path = files.resolve_inside(_bundle, name)
    assert path.resolve().parent == _bundle.resolve()


def fuzz_template(data: bytes) -> None:
    """A chat template, read and rendered."""
    ChatTemplate(data.decode("utf-8", "replace"), {"bos_token": "<s>", "eos_token": "</s>"}).render(CHAT)


def fuzz_request(data: bytes) -> None:
    """The body of a request to the server, by either route."""
    fields = parse_body(data)
    for read in (chat_request, completion_request):
        try:
            read(fields)
        except ApiError as error:
            assert error.status == 400


def fuzz_graph(data: bytes) -> None:
    """A stage graph of any form."""
    (_folder / "graph.onnx").write_bytes(data)
    check_graph_file(_folder / "graph.onnx", {"weights.bin": 4096}, FORMS[len(data) % 3])


FORMS = sorted(KNOWN)
TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": fuzz_manifest,
    "json": fuzz_json,
    "name": fuzz_name,
    "template": fuzz_template,
    "request": fuzz_request,
    "graph": fuzz_graph,
}


def run(target: str, data: bytes) -> None:
    """Run one input; errors that a user may see are what is wanted."""
    with suppress(FlrcError, ApiError):
        TARGETS[target](data)
