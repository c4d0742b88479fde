"""The dense graph of a model as optimum-onnx exports it, in a Python environment of its own.

optimum-onnx needs transformers 4, which this package's environment does not have.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from flrc_runtime.errors import FlrcError

ENVIRONMENT = "FLRC_EDGE_OPTIMUM"  # the python of that environment
HINT = (
    "python -m venv optimum-env && optimum-env/bin/pip install torch==2.13.0 optimum-onnx onnxruntime, then set "
    f"{ENVIRONMENT} to optimum-env/bin/python"
)


def optimum_python(given: str | None) -> str:
    """Return the python that has optimum-onnx.

    Args:
        given: Its path, or None for what ``FLRC_EDGE_OPTIMUM`` names.

    Raises:
        FlrcError: None is named, or it has no optimum-onnx.
    """
    python = given or os.environ.get(ENVIRONMENT)
    if not python:
        raise FlrcError("--graph optimum needs a Python environment with optimum-onnx", hint=HINT)
    try:
        done = subprocess.run(
            [python, "-c", "import optimum.exporters.onnx"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise FlrcError(f"{python} cannot be run: {error.strerror}", hint=HINT) from None
    if done.returncode:
        raise FlrcError(f"{python} has no optimum-onnx: {_last_line(done.stderr)}", hint=HINT)
    return python


def export_dense(python: str, model: Path, output: Path) -> Path:
    """Export a Hugging Face folder with its KV cache as inputs and outputs; return the graph file.

    Args:
        python: From :func:`optimum_python`.
        model: The folder.
        output: A folder that does not exist yet.

    Raises:
        FlrcError: optimum-onnx does not know the model, or failed.
    """
    command = [python, "-m", "optimum.exporters.onnx", "--model", str(model)]
    command += ["--task", "text-generation-with-past", "--framework", "pt", str(output)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=offline)
    graph = output / "model.onnx"
    if done.returncode or not graph.is_file():
        raise FlrcError(
            f"optimum-onnx could not export this model: {_last_line(done.stderr)}",
            hint="optimum-onnx may not know its family, or need a newer transformers",
        )
    return graph


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")
