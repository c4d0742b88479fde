"""Fuzz one target with coverage feedback: ``make fuzz SECONDS=600``, or ``python -m tests.fuzz.fuzz manifest 600``.

New inputs that reach new code go to ``out/fuzz/<target>``. One that crashes a reader, or keeps it for over two seconds,
is written beside that folder and ends the run: mend the reader and put the input into ``corpus/<target>``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["flrc_runtime", "jinja2"]):
    from flrc_runtime import chat_template
    from tests.fuzz.targets import TARGETS, run

CORPUS = Path(__file__).parent / "corpus"
SLOWEST = 2  # seconds
chat_template.MAX_STEPS = (
    20_000  # fewer than a template may take: instruments make each of them many times as slow
)


def main() -> None:
    """Fuzz until the time is over."""
    target, seconds = sys.argv[1], int(sys.argv[2])
    if target not in TARGETS:
        sys.exit(f"{target} is none of {', '.join(TARGETS)}")
    out = Path("out/fuzz")
    found = out / target
    found.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={seconds}",
        f"-timeout={SLOWEST}",
        f"-artifact_prefix={out}/{target}-",
        "-max_len=8192",
        "-print_final_stats=1",
        "-verbosity=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(found), str(CORPUS / target)], lambda data: run(target, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
