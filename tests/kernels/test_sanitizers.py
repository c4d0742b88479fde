"""The kernels' tests once more, on a library that AddressSanitizer and UBSan watch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = ("test_product.py", "test_prepare.py", "test_linear.py", "test_embedding.py", "test_attention.py")


@pytest.mark.full
def test_no_read_out_of_bounds_and_nothing_undefined() -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc, whose sanitizers this needs, is not installed")
    # libstdc++ as well: onnxruntime throws, and the sanitizer must have found who does that when it begins.
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(Path(library).is_file() for library in libraries):
        pytest.skip("gcc has no AddressSanitizer here")
    folder = Path(__file__).parent
    files = [str(folder / name) for name in TESTS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not full", *files],
        cwd=folder.parents[1],
        env={
            **os.environ,
            "FLRC_EDGE_SANITIZE": "1",
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert " passed" in done.stdout
