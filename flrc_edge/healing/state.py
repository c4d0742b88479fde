"""The state of an interrupted training run: one file beside the output, replaced whole, bound to its run.

``.<output>.healing/state.safetensors`` holds the trained tensors, the optimizer's moments and, in its metadata, the
step, the curve so far and what the run was started with.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flrc_edge.errors import FlrcError, FormatError, UsageError
from flrc_runtime.files import sync


@dataclass(frozen=True)
class Saved:
    """What a state file holds: tensors by name, and whatever else JSON can say."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


class StateFile:
    """Keeps the state of the run that will write ``output``.

    Args:
        output: The folder that the run publishes at its end.
        run: Everything the result depends on, by name; another run's state is refused.
    """

    def __init__(self, output: Path, run: Mapping[str, Any]) -> None:
        place = output.absolute()
        self._output = output
        self._folder = place.parent / f".{place.name}.healing"
        self._path = self._folder / "state.safetensors"
        self._run: dict[str, Any] = json.loads(json.dumps(run))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from the same output while the block runs.

        Raises:
            FlrcError: Another one is at it, or the folder cannot be written.
        """
        lock = FileLock(self._folder / "lock", timeout=0)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise UsageError(f"another run is healing into {self._output} at the moment") from None
        except OSError as error:
            raise FlrcError(f"{self._folder} cannot be written: {error.strerror or error}") from None
        try:
            yield
        finally:
            lock.release()
            if not self._path.exists():
                shutil.rmtree(self._folder, ignore_errors=True)

    def exists(self) -> bool:
        """Return whether there is a state."""
        return self._path.exists()

    def refuse_unless_resumed(self) -> None:
        """Refuse to begin again over the state of an interrupted run.

        Raises:
            UsageError: There is one.
        """
        if self.exists():
            raise UsageError(
                f"a run into {self._output} was interrupted",
                hint=f"pass --resume to go on with it, or remove {self._folder} to begin again",
            )

    def load(self) -> Saved:
        """Read the state.

        Raises:
            UsageError: It is of another run; names the first thing that differs.
            FormatError: The file is damaged.
        """
        try:
            with safe_open(self._path, framework="pt") as file:
                record = json.loads((file.metadata() or {})["record"])
                earlier = record.pop("run")
                for name in sorted(self._run.keys() | earlier.keys()):
                    old, new = earlier.get(name), self._run.get(name)
                    if old != new:
                        raise UsageError(
                            f"the interrupted run into {self._output} has {name} {_short(old)}, "
                            f"this one {_short(new)}",
                            hint=f"give the same options, or remove {self._folder} to begin again",
                        )
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError, AttributeError) as error:
            raise FormatError(
                f"the state in {self._folder} is damaged: {error}",
                hint="remove that folder and begin again",
            ) from None
        return Saved(tensors, record)

    def save(self, saved: Saved) -> None:
        """Replace the state; a failure leaves the earlier one.

        Raises:
            FlrcError: The file cannot be written.
        """
        temporary = self._folder / f"state.tmp-{os.getpid()}"
        try:
            text = json.dumps({**saved.record, "run": self._run}, allow_nan=False)
            save_file(saved.tensors, temporary, metadata={"record": text})
            sync(temporary)
            temporary.replace(self._path)
        except (SafetensorError, OSError) as error:
            raise FlrcError(
                f"the state could not be written to {self._folder}: {error}",
                hint="make room there; an earlier state, if there was one, is kept",
            ) from None
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the state: the run is complete."""
        self._path.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:12]}…"
