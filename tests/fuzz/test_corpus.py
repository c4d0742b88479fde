"""Inputs that the fuzzer kept, and those that once were faults, run without it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, run

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("target", TARGETS)
def test_corpus(target: str) -> None:
    inputs = sorted((CORPUS / target).iterdir())
    assert len(inputs) >= 3
    for path in inputs:
        begun = time.monotonic()
        run(target, path.read_bytes())
        assert time.monotonic() - begun < 10, path.name  # fuzz.py allows two seconds on a quiet machine
