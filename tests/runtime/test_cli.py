"""The command generate."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from flrc_edge.cli import group, main
from flrc_edge.cli.stage_text import StageText, printable
from flrc_runtime import manifest
from flrc_runtime.engine import Model

PROMPT = "Once upon a time"


STORIES = Path(__file__).parents[1] / "data" / "stories260k"


def run(*arguments: object, **options: object):
    return CliRunner().invoke(group, [str(a) for a in arguments], **options)


def test_generate_streams_text_and_tells_speed(bundle) -> None:
    # a process of its own: logging is set up once for stderr
    command = [sys.executable, "-m", "flrc_edge", "generate", bundle.folder, PROMPT, "--max-tokens", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(", there was a little girl named")
    (line,) = done.stderr.splitlines()
    assert line.startswith("20 tokens (stage 0: 8, stage 1: 12); prompt 5 tokens at ")


def test_generate_json(bundle) -> None:
    done = run("generate", bundle.folder, PROMPT, "--max-tokens", 12, "--json")
    result = json.loads(done.stdout)
    assert result["answer"].startswith(", there was a little girl")
    assert len(result["tokens"]) == 12 and result["stage_of_token"] == [0] * 8 + [1] * 4
    assert result["finish_reason"] == "length" and result["decode_tokens_per_second"] > 0


def test_generate_within_a_budget(bundle) -> None:
    def stages(*options: object) -> list[int]:
        done = run("generate", bundle.folder, PROMPT, "--max-tokens", 40, "--json", *options)
        return json.loads(done.stdout)["stage_of_token"]

    plan = manifest.read(bundle.folder).plan
    assert stages("--mean-keep", plan.kept(0)) == [0] * 40
    mixed = stages("--mean-keep", (plan.kept(0) + plan.kept(1)) / 2)
    assert mixed[0] == 0 and {*mixed} == {0, 1}
    assert stages("--ms-per-token", 1e6) == [0] * 40
    assert stages("--ms-per-token", 1e-6)[-30:] == [1] * 30
    for options, message in (
        (("--mean-keep", 0.1), "below"),
        (("--ms-per-token", 0), "not positive"),
        (("--ms-per-token", 5, "--stage", 1), "exclude each other"),
    ):
        done = run("generate", bundle.folder, PROMPT, *options)
        assert done.exit_code == 2 and message in done.stderr


def test_generate_speculative(bundle) -> None:
    alone = run("generate", bundle.folder, PROMPT, "--max-tokens", 40, "--json", "--stage", 0)
    drafted = run("generate", bundle.folder, PROMPT, "--max-tokens", 40, "--json", "--speculative")
    assert drafted.exit_code == 0, drafted.stderr
    assert json.loads(drafted.stdout)["tokens"] == json.loads(alone.stdout)["tokens"]
    both = run("generate", bundle.folder, PROMPT, "--speculative", "--stage", 1)
    assert both.exit_code == 2 and "exclude each other" in both.stderr


def test_generate_options(bundle) -> None:
    sampled = ("--temperature", 1, "--top-k", 40, "--top-p", 0.9, "--repetition-penalty", 1.1, "--seed", 5)
    first = run("generate", bundle.folder, PROMPT, "--max-tokens", 20, *sampled)
    assert first.exit_code == 0
    assert first.stdout == run("generate", bundle.folder, PROMPT, "--max-tokens", 20, *sampled).stdout
    stopped = run("generate", bundle.folder, "-", "--stop", "girl", "--threads", 1, input=PROMPT)
    assert stopped.stdout == ", there was a little \n"
    one = run("generate", bundle.folder, PROMPT, "--stage", 1, "--json", "--max-tokens", 3, "--context", 32)
    assert json.loads(one.stdout)["stage_of_token"] == [1, 1, 1]


def test_generate_marks_stages(bundle) -> None:
    shown = run("generate", bundle.folder, PROMPT, "--max-tokens", 12, "--show-stages").stdout
    plain = run("generate", bundle.folder, PROMPT, "--max-tokens", 12).stdout
    assert shown.startswith("[0],") and shown.count("[1]") == 1
    assert shown.replace("[0]", "").replace("[1]", "") == plain


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("",), 2, "the prompt is empty"),
        ((PROMPT, "--stage", 9), 2, "stage 9 is not one of the bundle's stages 0 to 1"),
        ((PROMPT, "--context", 5), 2, "leaves no room for an answer in a context of 5"),
        ((PROMPT, "--context", 9999), 2, "context 9999"),
        ((PROMPT, "--max-tokens", 0), 2, "max_tokens 0"),
        ((PROMPT, "--temperature", "nan"), 2, "temperature nan is not from 0 to 100"),
        ((PROMPT, "--stop", ""), 2, "stop strings"),
    ],
)
def test_generate_usage_errors(bundle, arguments: tuple[object, ...], code: int, message: str) -> None:
    done = run("generate", bundle.folder, *arguments)
    assert done.exit_code == code
    assert message in done.stderr and "Traceback" not in done.stderr and not done.stdout


def test_generate_damaged_bundle(copied: Path) -> None:
    (copied / "stage_0.onnx").write_bytes(b"")
    done = run("generate", copied, PROMPT)
    assert done.exit_code == 3 and done.stderr.startswith("Error: copy: stage_0.onnx has 0 bytes")


def test_stdin_must_be_text(bundle) -> None:
    done = run("generate", bundle.folder, "-", input=b"\xff\xfe")
    assert done.exit_code == 2 and "not UTF-8 text at byte 0" in done.stderr


@pytest.mark.parametrize("form", ["text", "json"])
def test_ctrl_c_keeps_the_text(
    bundle, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], form: str
) -> None:
    whole = Model.stream

    def interrupted(self, *arguments, **options):
        for token in whole(self, *arguments, **options):
            yield token
            if token.index == 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(Model, "stream", interrupted)
    arguments = ["flrc-edge", "generate", str(bundle.folder), PROMPT, *(["--json"] if form == "json" else [])]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    out = capfd.readouterr().out
    if form == "json":
        assert json.loads(out)["finish_reason"] == "interrupted"
        out = json.loads(out)["answer"] + "\n"
    assert out.startswith(", there was a ") and out.endswith("\n") and len(out) < 40


def test_stage_text() -> None:
    marked = StageText(color=False)
    parts = [("a", 0), ("", 1), ("b", 0), ("c", 1), ("d", 1), ("e", 0)]
    assert "".join(marked.piece(*p) for p in parts) == "[0]ab[1]cd[0]e"
    colored = StageText(color=True)
    assert colored.piece("a", 0) != colored.piece("a", 1) and "a" in colored.piece("a", 0)
    assert printable("a\x1b[2Jb\n\tc\x07é") == "a[2Jb\n\tcé"


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Block())
"""
OFFLINE = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "accelerate", "optimum")


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "BUNDLE", PROMPT, "--max-tokens", "3"]])
def test_a_device_needs_no_torch(bundle, arguments: list[str]) -> None:
    argv = ["flrc-edge", *(str(bundle.folder) if a == "BUNDLE" else a for a in arguments)]
    program = BLOCK.format(names=OFFLINE) + f"import flrc_runtime, flrc_edge.cli\nsys.argv = {argv}\n"
    done = subprocess.run(
        [sys.executable, "-c", program + "flrc_edge.cli.main()"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ("Usage" if "--help" in argv else ", there was") in done.stdout


def test_importing_the_runtime_is_cheap() -> None:
    heavy = ("numpy", "onnxruntime", "tokenizers", "jinja2")
    program = BLOCK.format(names=heavy) + "import flrc_runtime, flrc_edge.cli; flrc_runtime.FormatError"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("arguments", "package"),
    [(("demo", "-o", "unwritten"), "torch"), (("compress", str(STORIES), "-o", "unwritten"), "torch")],
)
def test_a_missing_extra_is_one_sentence(tmp_path: Path, arguments: tuple[str, ...], package: str) -> None:
    code = (
        "import sys\n"
        f"sys.modules[{package!r}] = None\n"
        f"sys.argv[1:] = {list(arguments)!r}\n"
        "from flrc_edge.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"Error: this command needs the package {package}" in done.stderr
    assert not (tmp_path / "unwritten").exists()
