"""Statistics kept between runs, so that another keep or other stages need no second calibration.

Entries are named by the fingerprint of model, texts and settings; the oldest are removed beyond a few. Large ones
are folders of one file a projection, written as they come and read when they are asked for: none is held in memory.
A run that is interrupted leaves ``.<entry>.part`` with a journal (pass_journal.py); the next one with the same
fingerprint goes on there.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Generic, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flrc_edge.cache import locked
from flrc_edge.calibration import Moments, Statistics
from flrc_runtime.cache import cache_folder
from flrc_runtime.errors import FlrcError
from flrc_runtime.files import sync

# Entries of each kind. SmolLM2-135M's statistics take 1.1 GB, its input moments 0.5 GB, losses 1 MB.
KEPT = {"statistics": 3, "input-moments": 2, "losses": 24, "rounding": 24}
SUFFIX = ".safetensors"
JOURNAL = "journal.safetensors"  # no projection is called so, either
TOTALS = "totals"  # loss and tokens of statistics; no projection is called so
UNREADABLE = (SafetensorError, OSError, KeyError, ValueError, TypeError)
WAITING = "waiting for another process that measures the same %s"
T = TypeVar("T")
_log = logging.getLogger(__name__)


class TensorFolder(MutableMapping[str, T], Generic[T]):
    """A mapping whose values are files of tensors; what cannot be written stays in memory.

    Args:
        folder: Where they are.
        names: The keys that it may have, in order.
        pack: Turns a value into tensors.
        unpack: Turns them back.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        pack: Callable[[T], dict[str, Tensor]],
        unpack: Callable[[Mapping[str, Tensor]], T],
    ) -> None:
        self.folder = folder
        self._names = tuple(names)
        self._pack, self._unpack = pack, unpack
        self._written: set[str] = set()
        self.unwritten: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name in self.unwritten:
            return self.unwritten[name]
        if name not in self._written:
            raise KeyError(name)
        return self._unpack(load_file(self._path(name)))  # a memory map: read where it is looked at

    def __setitem__(self, name: str, value: T) -> None:
        if name not in self._names:
            raise KeyError(name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(self._pack(value), self._path(name))
            sync(self._path(name))  # before the journal of the run says that it is there
            self._written.add(name)
        except (SafetensorError, OSError) as error:
            if not self.unwritten:
                _log.warning("the statistics could not be cached and stay in memory: %s", error)
            self.unwritten[name] = value
            with suppress(OSError):
                self._path(name).unlink(missing_ok=True)

    def __delitem__(self, name: str) -> None:
        raise TypeError("statistics are not removed one by one")

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if name in self._written or name in self.unwritten)

    def __len__(self) -> int:
        return len(self._written) + len(self.unwritten)

    def open(self) -> None:
        """Take what the folder holds, looking at the header of every file.

        Raises:
            SafetensorError, OSError, KeyError, ValueError, TypeError: A file is missing or damaged.
        """
        self._written = set(self._names)
        for name in self._names:
            self[name]

    def adopt(self) -> None:
        """Take what an interrupted run left in the folder, file by file; what is not whole is left out."""
        for name in self._names:
            if self._path(name).exists():
                self._written.add(name)
                try:
                    self[name]
                except UNREADABLE:
                    self._written.discard(name)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"


def cached_statistics(
    fingerprint: str | None,
    names: Sequence[str],
    compute: Callable[[MutableMapping[str, Moments] | None, Path | None], Statistics],
) -> Statistics:
    """Return the statistics stored under ``fingerprint``, or compute and store them.

    Args:
        fingerprint: None computes in memory.
        names: Of the projections, in the order of the model.
        compute: Measures them, into the mapping it is given or, without one, into memory; keeps its state in the
            file it is given (pass_journal.py). Under ``accelerate launch`` every process must reach it together.

    A cache that cannot be read or written is not an error.
    """

    def measured(
        into: MutableMapping[str, Moments] | None, journal: Path | None
    ) -> tuple[Mapping[str, Moments], Tensor]:
        found = compute(into, journal)
        return found.moments, torch.tensor([found.loss, found.tokens], dtype=torch.float64)

    moments, totals = _cached_folder("statistics", fingerprint, names, _packed_moments, _moments, measured)
    loss, tokens = totals.tolist()
    return Statistics(moments, loss, int(tokens))


def cached_matrices(
    kind: str,
    key: str | None,
    names: Sequence[str],
    compute: Callable[[MutableMapping[str, Tensor] | None, Path | None], Mapping[str, Tensor]],
) -> Mapping[str, Tensor]:
    """Return the matrices of a kind (see ``KEPT``) stored under ``key``, or compute and store them.

    Args:
        kind: Of the entry.
        key: None computes in memory.
        names: Of the matrices.
        compute: As in :func:`cached_statistics`.
    """
    return _cached_folder(
        kind,
        key,
        names,
        lambda matrix: {"": matrix},
        lambda tensors: tensors[""],
        lambda into, journal: (compute(into, journal), torch.empty(0)),
    )[0]


def cached_tensors(
    kind: str, key: str | None, compute: Callable[[Path | None], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the small tensors of a kind stored under ``key`` in one file, or compute and, but for None, store them.

    Args:
        kind: Of the entry.
        key: None computes without the cache.
        compute: Keeps its state in the file it is given.
    """
    path = _place(kind, key)
    if path is None:
        return compute(None)
    file = path.with_name(f"{path.name}{SUFFIX}")
    with _measuring(path):
        if file.exists():
            try:
                found = load_file(file)
                _log.info("%s taken from the cache", kind)
                return found
            except UNREADABLE as error:
                _log.warning("a cached %s file is damaged and is measured again: %s", kind, error)
        part = _part(path)
        result = compute(part / JOURNAL)
        temporary = part / file.name
        try:
            part.mkdir(parents=True, exist_ok=True)
            save_file(result, temporary)
            temporary.replace(file)
            _evict(file.parent, kind)
        except (SafetensorError, OSError) as error:
            _log.warning("the %s could not be cached: %s", kind, error)
        shutil.rmtree(part, ignore_errors=True)
        return result


def _place(kind: str, key: str | None) -> Path | None:
    """Return where an entry is; None if it is not to be stored, or several processes measure it together."""
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return None if key is None or distributed else cache_folder() / kind / key


def _part(path: Path) -> Path:
    """Return where an entry grows, and what an interrupted run left of it."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def _measuring(path: Path) -> Iterator[None]:
    """Let one process at a time measure an entry: the others wait, and find it. Unfinished other ones make room."""
    with ExitStack() as stack:
        with suppress(FlrcError):  # nothing can be written there: what is measured stays in memory
            stack.enter_context(locked(_lock(path), on_wait=lambda: _log.info(WAITING, path.parent.name)))
            _drop_parts(path)
        yield


def _lock(path: Path) -> Path:
    return cache_folder() / "locks" / f"{path.parent.name}-{path.name}.lock"


def _drop_parts(path: Path) -> None:
    """Remove what interrupted runs left of other entries, but for the newest."""
    parts = [p for p in path.parent.glob(".*.part") if p != _part(path)]
    for old in sorted(parts, key=lambda p: p.stat().st_mtime, reverse=True)[1:]:
        entry = old.with_name(old.name.removeprefix(".").removesuffix(".part"))
        with suppress(Timeout), FileLock(_lock(entry), timeout=0):  # else it grows at this moment
            shutil.rmtree(old, ignore_errors=True)


def _cached_folder(
    kind: str,
    key: str | None,
    names: Sequence[str],
    pack: Callable[[T], dict[str, Tensor]],
    unpack: Callable[[Mapping[str, Tensor]], T],
    compute: Callable[[MutableMapping[str, T] | None, Path | None], tuple[Mapping[str, T], Tensor]],
) -> tuple[Mapping[str, T], Tensor]:
    """Return an entry's values and totals, or compute them into a folder that gets its name when it is whole."""
    path = _place(kind, key)
    if path is None:
        return compute(None, None)
    with _measuring(path):
        if path.exists():
            try:
                found = _open(path, names, pack, unpack)
                with suppress(OSError):
                    # It is read from as long as this run lasts: the last to be removed by another.
                    os.utime(path)
                _log.info("%s taken from the cache", kind)
                return found
            except UNREADABLE as error:
                _log.warning("cached %s are damaged and are measured again: %s", kind, error)
        work = _part(path)
        into = TensorFolder(work, names, pack, unpack)
        into.adopt()
        values, totals = compute(into, work / JOURNAL)
        try:
            if not into.unwritten:
                save_file({"": totals}, work / f"{TOTALS}{SUFFIX}")
                (work / JOURNAL).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)
                work.replace(path)
                _evict(path.parent, kind)
                return _open(path, names, pack, unpack)
        except (SafetensorError, OSError) as error:
            _log.warning("the %s could not be cached: %s", kind, error)
        values = dict(values)  # what is in files stays mapped after they are gone
        shutil.rmtree(work, ignore_errors=True)
        return values, totals


def _open(
    path: Path,
    names: Sequence[str],
    pack: Callable[[T], dict[str, Tensor]],
    unpack: Callable[[Mapping[str, Tensor]], T],
) -> tuple[TensorFolder[T], Tensor]:
    values = TensorFolder(path, names, pack, unpack)
    values.open()
    return values, load_file(path / f"{TOTALS}{SUFFIX}")[""]


def _evict(folder: Path, kind: str) -> None:
    entries = [p for p in folder.iterdir() if not p.name.startswith(".")]
    for old in sorted(entries, key=lambda p: p.stat().st_mtime, reverse=True)[KEPT[kind] :]:
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


def _packed_moments(m: Moments) -> dict[str, Tensor]:
    return {
        "energy": m.energy,
        "gradient": m.gradient,
        "weighted": (
            m.energy if m.weighted is None else m.weighted
        ).clone(),  # which may be the energy itself
        "scalars": torch.tensor([m.gradient_trace, m.fisher_g2, m.fisher_gw2], dtype=torch.float64),
    }


def _moments(tensors: Mapping[str, Tensor]) -> Moments:
    trace, g2, gw2 = tensors["scalars"].tolist()
    return Moments(tensors["energy"], tensors["gradient"], trace, g2, gw2, tensors["weighted"])
