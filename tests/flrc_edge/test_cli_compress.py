"""``flrc-edge compress``: its options, its output, and one sentence for every mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flrc_edge.cli import group
from flrc_edge.cli.settings import parse_integers, parse_keeps, parse_size
from flrc_edge.errors import UsageError
from flrc_runtime import manifest

SMALL = ("--tokens", 2816, "--window", 256, "--rank-step", 8)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(group, [str(a) for a in arguments])


def check_refused(done: Result, code: int, message: str) -> None:
    """One sentence on stderr (and perhaps a hint), nothing on stdout, no traceback."""
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code, done.stderr
    assert message in done.stderr and done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith(("Error: ", "Hint: ")) and "Traceback" not in done.stderr
    errors = [line for line in lines if line.startswith("Error: ")]
    assert len(errors) == 1 and len(lines) <= 5


def test_compress(stories: Path, tmp_path: Path) -> None:
    done = run(
        "compress",
        stories,
        "-o",
        tmp_path / "c",
        "--stages",
        ".9,.8",
        "--boundaries",
        "7",
        "--no-cache",
        *SMALL,
    )
    assert done.exit_code == 0, done.stderr
    assert "projections dense" in done.stdout and "moves to stage 1 after 7 tokens" in done.stdout
    assert f"Next: flrc-edge export {tmp_path / 'c'}" in done.stdout and "calibrate" in done.stdout
    assert "Calibrating: 66/66" in done.stderr and "GiB" in done.stderr
    content = manifest.verify(tmp_path / "c")
    assert content.plan.keep == (0.9, 0.8) and content.schedule.boundaries == (7,)
    assert content.plan.kept(0) > 0.87


def test_options_reach_the_plan(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Once upon a time there was a girl. " * 900)
    done = run(
        "compress", stories, "-o", tmp_path / "c", "--keep", ".85", "--allocator", "fisher", "--score", "g2-rms",
        "--factorization", "one-sided", "--storage", "pivoted",
        "--calibration", f"{tmp_path / 'notes.txt'}:3", "--calibration", "austen", "--seed", 9, "--no-cache", *SMALL,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    content = manifest.read(tmp_path / "c")
    assert content.plan.allocator == "fisher" and content.factorization == "one-sided"
    assert {p.storage for p in content.plan.projections if not p.dense} == {"pivoted"}
    assert content.calibration is not None and content.calibration.seed == 9
    shares = [(t.name, t.weight, t.tokens) for t in content.calibration.texts]
    assert shares == [("notes.txt", 3.0, 2048), ("austen", 1.0, 768)]


def test_json_and_quiet(stories: Path, tmp_path: Path) -> None:
    done = run("--quiet", "compress", stories, "-o", tmp_path / "c", "--keep", ".8", "--json", *SMALL)
    assert done.exit_code == 0 and done.stderr == ""
    result = json.loads(done.stdout)
    assert set(result) == {"checkpoint", "bytes", "stages", "boundaries", "seconds", "peak_bytes"}
    assert result["checkpoint"] == str(tmp_path / "c") and result["boundaries"] == []
    assert 0.77 < result["stages"][0]["keep"] <= 0.8
    assert result["bytes"] == sum(f.size for f in manifest.read(tmp_path / "c").files.values())


def test_overwrite(stories: Path, tmp_path: Path) -> None:
    arguments = ("compress", stories, "-o", tmp_path / "c", "--keep", "1")
    assert run(*arguments).exit_code == 0
    check_refused(run(*arguments), 2, f"{tmp_path / 'c'} exists already")
    assert run(*arguments, "--overwrite").exit_code == 0
    (tmp_path / "c" / "thesis.txt").write_text("mine")
    check_refused(run(*arguments, "--overwrite"), 2, "holds thesis.txt, which flrc-edge did not write")
    assert (tmp_path / "c" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keep", "0"), "keep must lie in (0, 1], not 0"),
        (("--keep", "1.1"), "keep must lie in (0, 1], not 1.1"),
        (("--keep", "-.5"), "keep must lie in (0, 1], not -0.5"),
        (("--keep", "abc"), "'abc' is not a list of numbers"),
        (("--keep", ""), "'' is not a list of numbers"),
        (("--keep", "nan"), "keep must lie in (0, 1], not nan"),
        (("--keep", "inf"), "keep must lie in (0, 1], not inf"),
        (("--keep", ".9,.8"), "--keep takes one number"),
        (("--keep", ".001"), "keep 0.001 is below"),
        (("--stages", ".8,.9"), "the keep of each stage must be below the one before: 0.8, 0.9"),
        (("--stages", ".8,.8"), "the keep of each stage must be below the one before"),
        (("--stages", ".8,,.7"), "is not a list of numbers"),
        (("--stages", ".9,.001"), "keep 0.001 is below"),
        (("--keep", ".8", "--stages", ".9,.8"), "--keep and --stages say the same thing twice"),
        (("--keep", ".8", "--target-size", "1MB"), "--keep and --target-size say the same thing twice"),
        (("--target-size", "1kB"), "the least that the smallest ranks"),
        (("--target-size", "big"), "'big' is not a size such as 600MB"),
        (("--target-size", "0MB"), "'0MB' is not a size"),
        (("--target-size", ""), "'' is not a size"),
        (("--target-size", "90MB,90MB"), "the sizes of the stages must fall"),
        (("--target-size", "90MB", "--allocator", "fisher"), "cannot meet a size"),
        (("--dtype", "mixed"), "mixed number formats are chosen for a size"),
        (("--boundaries", "a"), "'a' is not a list of whole numbers"),
        (("--boundaries", ""), "'' is not a list of whole numbers"),
        (("--boundaries", "3"), "3 stages need 2 boundaries"),
        (("--boundaries", "9,3"), "boundaries must be at least 1 and must not fall"),
        (("--tokens", "0"), "tokens must be at least 2"),
        (("--tokens", "100"), "100 calibration tokens do not fill one window"),
        (("--tokens", "x"), "Invalid value for '--tokens'"),
        (("--window", "1"), "window must be at least 2"),
        (("--rank-step", "0"), "rank_step must be at least 1"),
        (("--seed", "-1"), "seed must lie between"),
        (("--allocator", "best"), "Invalid value for '--allocator'"),
        (("--storage", "dense"), "Invalid value for '--storage'"),
        (("--calibration", "nowhere.txt"), "there is no text 'nowhere.txt'"),
        (("--calibration", "austen:0"), "the weight in 'austen:0' must be a positive number"),
        (("--calibration", ""), "'' names no text"),
        (("--tokens", "4000000"), "tokens, "),
    ],
)
def test_usage_errors(stories: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    small = () if "--tokens" in arguments or "--window" in arguments else SMALL[:4]
    done = run("compress", stories, "-o", tmp_path / "c", *small, *arguments)
    check_refused(done, 2, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"a\x00b", b"\xff\xfe", b"short"])
def test_calibration_files_that_will_not_do(stories: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    done = run("compress", stories, "-o", tmp_path / "c", "--calibration", tmp_path / "text.txt", *SMALL)
    check_refused(done, 2, f"the text {tmp_path / 'text.txt'}")
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_models_that_will_not_do(copied_model: Callable[..., Path], tmp_path: Path) -> None:
    out = ("-o", tmp_path / "c")
    check_refused(run("compress", "no-such-model", *out), 2, "there is no model 'no-such-model'")
    check_refused(run("compress", "smollm2-135m", *out), 1, "smollm2-135m is not on this machine yet")
    check_refused(run("compress", "", *out), 2, "there is no model ''")
    folder = copied_model("llama", model_type="gpt2", architectures=None)
    check_refused(run("compress", folder, *out), 1, "model_type 'gpt2' is not supported")
    (folder / "config.json").write_text('{"model_type": "llama"')
    check_refused(run("compress", folder, *out), 3, "config.json cannot be read")
    (folder / "config.json").unlink()
    check_refused(run("compress", folder, *out), 1, "holds no config.json")
    assert not (tmp_path / "c").exists()


def test_a_truncated_model(copied_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = copied_model("llama")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    done = run("compress", folder, "-o", tmp_path / "c")
    check_refused(done, 3, "model.safetensors")


def test_a_checkpoint_is_no_model(compressed_stories: Any, tmp_path: Path) -> None:
    done = run("compress", compressed_stories.checkpoint, "-o", tmp_path / "c")
    check_refused(done, 1, "is a folder that flrc-edge wrote, not a model to compress")


def test_output_that_cannot_be_written(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    check_refused(run("compress", stories, "-o", tmp_path / "file"), 2, "exists and is not a folder")
    below = run("compress", stories, "-o", tmp_path / "file" / "c")
    check_refused(below, 2, f"{tmp_path / 'file'} is not a folder that can be written")
    check_refused(run("compress", stories, "-o", tmp_path), 2, "exists already")
    done = run("compress", stories, "-o", tmp_path, "--overwrite")
    check_refused(done, 2, "was not written by flrc-edge, so it is not overwritten")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_nan_weight_is_named(copied_model: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied_model("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = run("compress", folder, "-o", tmp_path / "c", "--tokens", 512, "--window", 128, "--rank-step", 8)
    assert done.exit_code == 1
    assert "Error: llama: model.layers.1.mlp.gate_proj.weight holds a value that is not finite" in done.stderr
    assert not (tmp_path / "c").exists()


def flrc_edge(*arguments: object, launcher: tuple[str, ...] = (), cwd: Path | None = None) -> Any:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", *(launcher or ("flrc_edge",)), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=180, cwd=cwd, env=environment
    )


def test_a_mistake_in_a_process_of_its_own(stories: Path, tmp_path: Path) -> None:
    done = flrc_edge("compress", stories, "-o", tmp_path / "c", "--keep", "1.5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: keep must lie in (0, 1], not 1.5\n"


def test_two_processes_write_what_one_writes(stories: Path, tmp_path: Path) -> None:
    """The command of the help text, on two CPU processes; sums in another order differ in the last bits."""
    import torch
    from safetensors.torch import load_file

    arguments = ("compress", stories, "--keep", ".8", "--no-cache", *SMALL)
    launcher = (
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        "-m",
        "flrc_edge",
    )
    done = flrc_edge(*arguments, "-o", tmp_path / "two", launcher=launcher, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("projections dense") == 1  # one process reports
    assert done.stderr.count("Calibrating: 36/36") == 1 and "Traceback" not in done.stderr
    assert run(*arguments, "-o", tmp_path / "one").exit_code == 0
    one, two = (manifest.verify(tmp_path / name) for name in ("one", "two"))
    assert one.plan.projections == two.plan.projections and one.calibration == two.calibration
    a, b = (load_file(tmp_path / name / "factors.safetensors") for name in ("one", "two"))
    for p in one.plan.projections:
        if not p.dense:
            first, second = (f[f"{p.name}.chunks.0.U"] @ f[f"{p.name}.chunks.0.V"] for f in (a, b))
            assert torch.allclose(first, second, rtol=1e-3, atol=1e-4)


def test_help_names_the_units_and_the_launcher() -> None:
    text = run("compress", "--help").stdout
    assert (
        "\n  accelerate launch --multi_gpu --num_processes 2 -m flrc_edge compress smollm2-135m -o ckpt\n"
        in text
    )
    assert "\n  flrc-edge compress smollm2-135m -o ckpt --stages .9,.8,.7\n" in text and "\\b" not in text
    for option in (
        "--keep",
        "--stages",
        "--target-size",
        "--calibration",
        "--storage",
        "--rank-step",
        "--overwrite",
        "--json",
    ):
        assert option in text


@pytest.mark.parametrize(
    ("text", "size"),
    [("600MB", 600_000_000), ("1.5g", 1_500_000_000), ("90 mb", 90_000_000), (".5k", 500), ("1000", 1000),
     ("7B", 7)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1TB", "1.2.3", "nan", "1e9", "0"])
def test_sizes_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


def test_lists() -> None:
    assert parse_keeps(".9, .8,1") == (0.9, 0.8, 1.0) and parse_integers("16, 64") == (16, 64)
    for text in ("", "a", "1;2"):
        with pytest.raises(UsageError):
            parse_keeps(text)
    with pytest.raises(UsageError):
        parse_integers("1.5")
