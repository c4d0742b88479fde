"""``optimum-cli export flrc``: optimum finds this file by its place in the namespace, which has no ``__init__.py``."""

from __future__ import annotations

import sys
import tempfile
from argparse import ArgumentParser
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class FlrcExportCommand(BaseOptimumCLICommand):
    """``flrc-edge compress`` and ``flrc-edge export`` in one."""

    COMMAND = CommandInfo(
        "flrc", "Compress a causal language model into nested low-rank ONNX graphs (flrc-edge)."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add the options, which have the names and defaults of flrc-edge."""
        parser.add_argument(
            "-m", "--model", required=True, help="Folder, GGUF file, hub id or built-in name."
        )
        parser.add_argument("output", type=Path, help="Bundle folder to write.")
        size = parser.add_mutually_exclusive_group()
        size.add_argument("--keep", help="Share of the projections' parameters to keep: one stage.")
        size.add_argument("--stages", help="Keep of each stage, such as .9,.8,.7.")
        size.add_argument("--target-size", help="Bytes of the weights, such as 90MB.")
        parser.add_argument(
            "--dtype",
            default="int4",
            help="fp32, or integers such as int8 or int4/128, rounded with compensation.",
        )
        parser.add_argument(
            "--storage", choices=("plain", "pivoted"), default="plain", help="How factors are stored."
        )
        parser.add_argument("--calibration", action="append", default=[], help="TEXT[:WEIGHT], repeatable.")
        parser.add_argument("--tokens", help="Calibration tokens.")
        parser.add_argument("--window", help="Tokens of a calibration window.")
        parser.add_argument("--rank-step", help="Ranks are multiples of it.")
        parser.add_argument("--overwrite", action="store_true", help="Replace a bundle that is there.")

    def run(self) -> None:
        """Write the bundle; the checkpoint between is temporary."""
        from flrc_edge.cli import run
        from flrc_runtime.errors import FlrcError
        from flrc_runtime.output_folder import check_output_folder

        given = self.args
        floats = given.dtype == "fp32"
        options = [("--storage", given.storage), ("--dtype", "float" if floats else given.dtype)]
        for name in ("keep", "stages", "target_size", "tokens", "window", "rank_step"):
            if (value := getattr(given, name)) is not None:
                options.append((f"--{name.replace('_', '-')}", value))
        options += [("--calibration", text) for text in given.calibration]
        target: Path = given.output
        try:
            check_output_folder(target, overwrite=given.overwrite)  # before hours of work
        except FlrcError as error:
            sys.exit(f"Error: {error}")
        last = ["--dtype", "fp32"] if floats else []
        last += ["--overwrite"] if given.overwrite else []
        with tempfile.TemporaryDirectory(prefix=".flrc-", dir=_existing(target)) as folder:
            checkpoint = str(Path(folder) / "checkpoint")
            with redirect_stdout(StringIO()):  # which tells what to do with the checkpoint
                code = run(["compress", given.model, "-o", checkpoint, *(p for o in options for p in o)])
            code = code or run(["export", checkpoint, "-o", str(target), *last])
        if code:
            sys.exit(code)


def _existing(path: Path) -> Path:
    """Return the nearest folder above that exists: the bundle's disk has room for the checkpoint, /tmp may not."""
    return next(p for p in path.absolute().parents if p.is_dir())


REGISTER_COMMANDS = [(FlrcExportCommand, ExportCommand)]
