"""The perplexities of a rank search on disk, so that hours of evaluations survive an interruption and a second run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flrc_edge.errors import FormatError
from flrc_runtime.files import read_json, write_json

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Truncation:
    """One projection at one rank.

    Args:
        name: Of the projection.
        rank: Its rank; all other projections are dense.
        perplexity: Of the whole model.
        seconds: Wall time that measuring it took.
    """

    name: str
    rank: int
    perplexity: float
    seconds: float = 0.0


class SensitivityStore:
    """Truncations by projection and rank; a file that cannot be read or written is not an error.

    Args:
        path: A JSON file named by the fingerprint of all they depend on; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.resumed = False  # whether anything an earlier run measured was asked for
        self._known: dict[tuple[str, int], Truncation] = {}
        if path is not None and path.exists():
            try:
                rows = [Truncation(**row) for row in read_json(path)]
                self._known = {(t.name, t.rank): t for t in rows}
            except (FormatError, TypeError, OSError) as error:
                _log.warning("stored sensitivities are damaged and are measured again: %s", error)

    def get(self, name: str, rank: int) -> Truncation | None:
        """Return what was measured earlier, or None."""
        known = self._known.get((name, rank))
        self.resumed |= known is not None
        return known

    def put(self, truncations: Sequence[Truncation]) -> None:
        """Keep measurements, and write the file anew."""
        self._known |= {(t.name, t.rank): t for t in truncations}
        if self._path is None or not truncations:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, [asdict(t) for t in self._known.values()])
        except OSError as error:
            _log.warning("the sensitivities could not be stored: %s", error)
            self._path = None
