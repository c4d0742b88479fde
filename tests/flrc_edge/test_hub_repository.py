"""Push and pull against a hub on this machine, through the real client, each command in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flrc_runtime import manifest
from tests.flrc_edge.hub_server import TOKEN, Hub, running_hub

NAME = "someone/stories"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as found:
        yield found


@pytest.fixture
def folder(compressed_stories: object, tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    target = tmp_path / "here" / "stories"
    shutil.copytree(compressed_stories.checkpoint, target)  # type: ignore[attr-defined]
    return target


@pytest.fixture
def there(tmp_path: Path) -> Path:
    target = tmp_path / "there"
    target.mkdir()
    return target


def start(
    hub: Hub, *arguments: object, cwd: Path, token: str | None = TOKEN, offline: bool = False
) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(cwd / ".hf"),
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    if token is not None:
        environment["HF_TOKEN"] = token
    command = [sys.executable, "-m", "flrc_edge", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True)


def run(hub: Hub, *arguments: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    process = start(hub, *arguments, cwd=cwd, **options)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def pushed(hub: Hub, folder: Path) -> None:
    hub.commit(NAME, "main", {path.name: path.read_bytes() for path in folder.iterdir()})


def test_what_is_pushed_comes_back_the_same(hub: Hub, folder: Path, there: Path) -> None:
    result = run(hub, "push", folder, NAME, "--private", cwd=there)
    assert result.returncode == 0, result.stderr
    assert f"{hub.address}/{NAME}/commit/{hub.branches[NAME]['main']}" in result.stdout
    assert hub.private == {NAME}
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.files(NAME) == files | {".gitattributes": b""}
    assert len(hub.commits) == 2  # the empty repository, and all files in one

    result = run(hub, "pull", NAME, cwd=there)
    assert result.returncode == 0, result.stderr
    assert {path.name: path.read_bytes() for path in (there / "stories").iterdir()} == files
    assert "Next: flrc-edge export stories" in result.stdout
    assert "downloading factors.safetensors" in result.stderr
    assert [path.name for path in there.iterdir() if path.name != ".hf"] == ["stories"]

    result = run(hub, "pull", NAME, cwd=there)
    assert (result.returncode, "stories exists already" in result.stderr) == (2, True)


def test_a_second_push_on_a_branch_leaves_main(hub: Hub, folder: Path, there: Path) -> None:
    hub.commit(NAME, "main", {"flrc.json": b"{}", "old.onnx": b"an older push"})
    (folder / "README.md").write_text("my own card\n")
    result = run(hub, "push", folder, NAME, "--revision", "int8", "--json", cwd=there)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["commit"].endswith(hub.branches[NAME]["int8"])
    assert hub.files(NAME, "main") == {"flrc.json": b"{}", "old.onnx": b"an older push"}
    result = run(hub, "-q", "pull", NAME, "--revision", "int8", "-o", "mine", cwd=there)
    assert (result.returncode, result.stderr) == (0, "")
    manifest.verify(there / "mine", "checkpoint")
    assert (there / "mine" / "README.md").read_text() == "my own card\n"
    assert not (there / "mine" / "old.onnx").exists()  # not listed


def test_dry_runs_write_nothing(hub: Hub, folder: Path, there: Path) -> None:
    result = run(hub, "push", folder, NAME, "--dry-run", cwd=there)
    assert result.returncode == 0, result.stderr
    assert "factors.safetensors" in result.stdout
    assert "README.md" in result.stdout
    assert hub.requests == []

    pushed(hub, folder)
    result = run(hub, "pull", NAME, "--dry-run", "--json", cwd=there)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["files"] == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert found["commit"] == hub.branches[NAME]["main"]
    resolved = {path.rpartition("/")[2] for _, path in hub.requests if "/resolve/" in path}
    assert resolved == {"flrc.json"}
    assert not (there / "stories").exists()


def test_an_interrupted_pull_goes_on(hub: Hub, folder: Path, there: Path) -> None:
    pushed(hub, folder)
    hub.stall = "factors.safetensors"
    process = start(hub, "pull", NAME, cwd=there)
    assert hub.stalled.wait(60)
    process.kill()
    process.communicate()
    assert not (there / "stories").exists()
    before = {path.name for path in (there / ".stories.download" / "someone--stories").iterdir()}
    assert {"flrc.json", "base.safetensors"} <= before

    hub.requests.clear()
    result = run(hub, "pull", NAME, cwd=there)
    assert result.returncode == 0, result.stderr
    manifest.verify(there / "stories")
    fetched = {path.rpartition("/")[2] for method, path in hub.requests if method == "GET"}
    assert "factors.safetensors" in fetched
    assert not fetched & before, "what is there is not fetched again"
    assert [path.name for path in there.iterdir() if path.name != ".hf"] == ["stories"]


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_push_without_a_token_says_how_to_get_one(
    hub: Hub, folder: Path, there: Path, token: str | None
) -> None:
    result = run(hub, "push", folder, NAME, cwd=there, token=token)
    assert result.returncode == 1
    assert f"the hub does not let you write to {NAME}" in result.stderr
    assert "hf auth login" in result.stderr
    assert "Traceback" not in result.stderr


def test_push_refuses_what_flrc_json_does_not_list(hub: Hub, folder: Path, there: Path) -> None:
    card = (folder / "README.md").read_bytes()
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/etc/hostname")
    result = run(hub, "push", folder, NAME, cwd=there)
    assert (result.returncode, hub.requests) == (3, [])
    (folder / "README.md").unlink()
    (folder / "README.md").write_bytes(card)
    (folder / "secret.txt").write_text("my token")
    result = run(hub, "push", folder, NAME, cwd=there)
    assert (result.returncode, hub.requests) == (3, [])
    assert "secret.txt is not listed" in result.stderr


@pytest.mark.parametrize("name", ["no-owner", "a/b/c", "some one/x", "x/"])
def test_push_refuses_a_name_that_is_none(hub: Hub, folder: Path, there: Path, name: str) -> None:
    result = run(hub, "push", folder, name, "--dry-run", cwd=there)
    assert result.returncode == 2
    assert "owner/name" in result.stderr


def test_pull_of_what_is_not_there(hub: Hub, folder: Path, there: Path) -> None:
    result = run(hub, "pull", NAME, cwd=there)
    assert (result.returncode, f"the hub has no model {NAME}" in result.stderr) == (1, True)
    pushed(hub, folder)
    result = run(hub, "pull", NAME, "--revision", "v9", cwd=there)
    assert (result.returncode, "has no such revision" in result.stderr) == (1, True)
    hub.commit("someone/llama", "main", {"config.json": b"{}"})
    result = run(hub, "pull", "someone/llama", cwd=there)
    assert (result.returncode, "flrc-edge compress someone/llama" in result.stderr) == (3, True)
    result = run(hub, "pull", NAME, cwd=there, offline=True)
    assert (result.returncode, "HF_HUB_OFFLINE is set" in result.stderr) == (1, True)
    hub.address = "http://127.0.0.1:1"  # nobody listens
    result = run(hub, "pull", NAME, cwd=there)
    assert (result.returncode, "could not be downloaded" in result.stderr) == (1, True)
    assert "Traceback" not in result.stderr
    assert not (there / "stories").exists()


def test_pull_refuses_damaged_and_hostile_repositories(hub: Hub, folder: Path, there: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = bytearray(files["factors.safetensors"])
    weights[-1] ^= 1
    hub.commit(NAME, "main", files | {"factors.safetensors": bytes(weights)})
    result = run(hub, "pull", NAME, cwd=there)
    assert (result.returncode, f"{NAME}: checksum mismatch in factors.safetensors" in result.stderr) == (
        3,
        True,
    )

    hub.commit(NAME, "main", files | {"factors.safetensors": b"short"})
    result = run(hub, "pull", NAME, cwd=there)
    assert (result.returncode, "factors.safetensors has 5 bytes" in result.stderr) == (3, True)

    content = json.loads(files["flrc.json"])
    content["files"]["../../evil"] = {"size": 4, "sha256": "0" * 64}
    hub.commit(NAME, "main", files | {"flrc.json": json.dumps(content).encode(), "../../evil": b"evil"})
    result = run(hub, "pull", NAME, cwd=there)
    assert (result.returncode, "is not a plain file name" in result.stderr) == (3, True)

    hub.commit(NAME, "main", files | {"flrc.json": b" " * (4 * 1024 * 1024 + 1)})
    result = run(hub, "pull", NAME, cwd=there)
    assert (result.returncode, "more than" in result.stderr) == (3, True)
    assert not (there / "stories").exists()
    assert not list(there.parent.rglob("evil"))


def test_options_that_do_not_belong_together(hub: Hub, there: Path) -> None:
    result = run(hub, "pull", "smollm2-135m", "-o", "x", cwd=there)
    assert (result.returncode, "OWNER/NAME" in result.stderr) == (2, True)
    result = run(hub, "pull", NAME, "--gguf", "x", cwd=there)
    assert (result.returncode, "--gguf" in result.stderr) == (2, True)
    result = run(hub, "pull", "smollm2-135m", "--dry-run", cwd=there)
    assert (result.returncode, "MB would be downloaded" in result.stdout) == (0, True)
