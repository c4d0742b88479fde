"""``flrc.json``: what a checkpoint or a bundle is, and the one owner of that format (docs/format.md).

The file is written last; it names every other file of its folder with size and SHA-256, but for the model card: people
edit that one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import FormatError, VerificationError
from .files import check_name, read_json, resolve_inside, sha256_of, write_json
from .genai_file import GENAI_FILE, check_genai_file
from .graph_file import GraphForm, check_graph_file
from .typed_json import build

SCHEMA_VERSION = 3
READABLE = (2, 3)  # 2: bundles of onnxruntime's operators alone
FILE_NAME = "flrc.json"
CARD = "README.md"
_UNLISTED = (FILE_NAME, CARD)
MAX_STAGES = 64

Kind = Literal["checkpoint", "bundle", "static", "portable"]
Storage = Literal["plain", "pivoted"]
KIND_NAMES: dict[Kind, str] = {
    "checkpoint": "checkpoint",
    "bundle": "bundle",
    "static": "static bundle",
    "portable": "portable folder",
}
# What writes a folder of the kind that is needed.
_WRITERS: dict[Kind, str] = {
    "checkpoint": "flrc-edge compress writes a checkpoint",
    "bundle": "flrc-edge export writes a bundle",
    "static": "flrc-edge export --graph static writes one",
    "portable": "flrc-edge export --graph optimum writes one",
}
_OPENED_ELSEWHERE = "optimum's ORTModelForCausalLM opens it (docs/optimum.md)"
# How a matrix is stored: float32, or integers of so many bits with one scale a block of so many inputs.
FORMATS = ("fp32", *(f"int{bits}/{block}" for bits in (8, 4, 2) for block in (32, 64, 128)))


@dataclass(frozen=True)
class ModelInfo:
    """The facts of the original model that a reader needs; sizes count elements, lengths count tokens."""

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    parameters: int  # of the whole original model, a tied embedding counted once

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            _require(_is_count(getattr(self, name), 1), f"model.{name} must be a positive integer")
        _require(_is_count(self.context_length, 1), "model.context_length must be a positive integer")
        _require(_is_count(self.parameters, 1), "model.parameters must be a positive integer")
        _require(
            all(_is_count(t) and t < self.vocab_size for t in self.eos_token_ids),
            "model.eos_token_ids must lie inside the vocabulary",
        )


@dataclass(frozen=True)
class ProjectionPlan:
    """How one projection is stored.

    Args:
        name: Of the projection.
        shape: ``(m, n)``: out and in features.
        ranks: Rank at every stage, not growing; None at every stage: kept dense.
        storage: ``plain``: every chunk as ``U: [m, r]`` and ``V: [r, n]``; ``pivoted``: ``V`` holds r rows of the
            chunk's product itself and ``U: [m - r, r]`` the other rows as combinations of them (PIFA).
        formats: Number format of every stored matrix: of the dense one, or of V and U of every chunk in turn. Empty:
            floats of the folder's dtype.
    """

    name: str
    shape: tuple[int, int]
    ranks: tuple[int | None, ...]
    storage: Storage = "plain"
    formats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        m, n = self.shape
        _require(self.storage in get_args(Storage), f"{self.name}: storage {self.storage!r} is unknown")
        _require(_is_count(m, 1) and _is_count(n, 1), f"{self.name}: shape must be two positive integers")
        factored = list(self.factored_ranks)
        _require(len(factored) in (0, len(self.ranks)), f"{self.name}: dense at some stages but not at all")
        _require(
            all(_is_count(r, 1) and r <= min(m, n) for r in factored),
            f"{self.name}: ranks must lie between 1 and {min(m, n)}",
        )
        _require(factored == sorted(factored, reverse=True), f"{self.name}: ranks must not grow over stages")
        if self.formats:
            _require(set(self.formats) <= set(FORMATS), f"{self.name}: a format of {self.formats} is unknown")
            matrices = len(self.matrices()) if self.ranks else 0
            _require(
                len(self.formats) == matrices, f"{self.name}: {matrices} matrices need as many number formats"
            )

    @property
    def dense(self) -> bool:
        """Whether the projection keeps its full matrix."""
        return self.ranks[0] is None

    @property
    def factored_ranks(self) -> tuple[int, ...]:
        """The ranks of all stages; none if the projection is dense."""
        return tuple(r for r in self.ranks if r is not None)

    def parameters(self, stage: int) -> int:
        """Return the parameters activated at ``stage``: those of the chunks it reads, or ``m n`` if dense."""
        rank = self.ranks[stage]
        if rank is None:
            return self.shape[0] * self.shape[1]
        read = (stop - start for start, stop in self.chunks() if stop <= rank)
        return sum(factor_parameters(self.shape, r, storage=self.storage) for r in read)

    def chunks(self) -> tuple[tuple[int, int], ...]:
        """Return the blocks ``[start, stop)`` of ranks that stages share, the one every stage reads first."""
        bounds = [0, *sorted(set(self.factored_ranks))]
        return tuple(pairwise(bounds))

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return the shape of every stored matrix by name: ``weight``, or ``chunks.0.V``, ``chunks.0.U`` and so on."""
        m, n = self.shape
        if self.dense:
            return {"weight": self.shape}
        result = {}
        for i, (start, stop) in enumerate(self.chunks()):
            rank = stop - start
            result[f"chunks.{i}.V"] = (rank, n)
            result[f"chunks.{i}.U"] = (m - rank if self.storage == "pivoted" else m, rank)
        return result

    def format_of(self, matrix: str) -> str:
        """Return the number format of a matrix of :meth:`matrices`; empty if it is stored in floats."""
        return self.formats[list(self.matrices()).index(matrix)] if self.formats else ""


@dataclass(frozen=True)
class RankPlan:
    """The ranks of every projection at every stage, and how they were chosen.

    Args:
        allocator: Name of the rule.
        keep: The asked share of projection parameters of each stage, not growing.
        projections: In the order of the model.
        scores: What the rule measured per projection (for instance its Fisher score), or empty.
        embedding: Number format of the embedding and of the head; empty: floats of the folder's dtype.
        candidates: Mean KL (nats) to the original of every plan that a search compared, by the name of its rule.
    """

    allocator: str
    keep: tuple[float, ...]
    projections: tuple[ProjectionPlan, ...]
    scores: Mapping[str, float] = field(default_factory=dict)
    embedding: str = ""
    candidates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(1 <= len(self.keep) <= MAX_STAGES, f"plan.keep must name 1 to {MAX_STAGES} stages")
        _require(all(_is_share(k) for k in self.keep), "plan.keep must lie in (0, 1]")
        _require(list(self.keep) == sorted(self.keep, reverse=True), "plan.keep must not grow")
        _require(
            all(len(p.ranks) == len(self.keep) for p in self.projections),
            "every projection needs one rank a stage",
        )
        _require(len(self.projections) > 0, "plan.projections is empty")
        names = [p.name for p in self.projections]
        _require(len(set(names)) == len(names), "a projection is listed twice")
        _require(self.embedding in ("", *FORMATS), f"plan.embedding {self.embedding!r} is unknown")
        _require(
            len({bool(p.formats) for p in self.projections} | {bool(self.embedding)}) == 1,
            "some number formats are given and others not",
        )
        for name, value in (*self.scores.items(), *self.candidates.items()):
            _require(
                isinstance(value, int | float) and math.isfinite(value), f"score of {name} is not finite"
            )

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.keep)

    @property
    def dense_parameters(self) -> int:
        """Parameters of all projections before compression."""
        return sum(p.shape[0] * p.shape[1] for p in self.projections)

    def activated(self, stage: int) -> int:
        """Return the projection parameters that decoding at ``stage`` reads."""
        return sum(p.parameters(stage) for p in self.projections)

    def kept(self, stage: int) -> float:
        """Return the share of projection parameters activated at ``stage``."""
        return self.activated(stage) / self.dense_parameters

    def by_name(self) -> dict[str, ProjectionPlan]:
        """Return the projections by name."""
        return {p.name: p for p in self.projections}


@dataclass(frozen=True)
class Schedule:
    """Token count -> stage. The prompt, and so the first answer token, always comes from stage 0.

    Args:
        boundaries: Number of generated tokens at which decoding moves to stage 1, 2, …; not falling.
        horizon: Answer length in tokens the schedule was chosen for.
        divergence: Mean KL(dense || stage) in nats per measured position block, one row a stage; may be empty.
        block: Tokens a measured position block holds.
        validation: What falling ranks gain over one constant stage of the same mean share, measured on answers the
            boundaries were not chosen on: mean KL (nats) as ``schedule_kl``, ``constant_kl``, ``reversed_kl``, the
            mean activated ``share``, ``gain`` and ``gain_error``, ``answers`` and ``tokens``; or empty.
    """

    boundaries: tuple[int, ...]
    horizon: int = 0
    divergence: tuple[tuple[float, ...], ...] = ()
    block: int = 0
    validation: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(
            all(_is_count(b, 1) for b in self.boundaries), "schedule.boundaries must be positive integers"
        )
        _require(list(self.boundaries) == sorted(self.boundaries), "schedule.boundaries must not fall")
        _require(
            all(math.isfinite(v) for row in self.divergence for v in row),
            "schedule.divergence holds a number that is not finite",
        )
        _require(
            all(math.isfinite(v) for v in self.validation.values()),
            "schedule.validation holds a number that is not finite",
        )

    def first_token(self, stage: int, context: int) -> int | None:
        """Return the first answer token that ``stage`` may compute, or None if no answer reaches it."""
        starts = (0, *self.boundaries, context)
        return starts[stage] if starts[stage] < min(starts[stage + 1], context) else None

    def stage_at(self, generated: int) -> int:
        """Return the stage that computes the answer token with index ``generated`` (0-based)."""
        return bisect_right(self.boundaries, generated)


@dataclass(frozen=True)
class TextSource:
    """One calibration text: its name, content hash, weight and the tokens drawn from it."""

    name: str
    sha256: str
    weight: float
    tokens: int


@dataclass(frozen=True)
class Calibration:
    """What the statistics were measured on; ``fingerprint`` identifies model, texts and settings."""

    texts: tuple[TextSource, ...]
    tokens: int
    window: int
    seed: int
    fingerprint: str


@dataclass(frozen=True)
class StageInfo:
    """One exported stage: its graph file and the bytes of weights a decode step reads."""

    graph: str
    keep: float  # activated share of the projection parameters
    bytes: int

    def __post_init__(self) -> None:
        _require(self.keep > 0, f"stage {self.graph}: keep must be positive")
        _require(_is_count(self.bytes, 1), f"stage {self.graph}: bytes must be a positive integer")


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of ``flrc.json``.

    Args:
        kind: ``checkpoint`` (written by ``compress``), ``bundle`` (written by ``export``), ``static`` (by ``export
            --graph static``: two graphs of fixed shapes a stage, for accelerators), or ``portable`` (by ``export
            --graph optimum``: graphs of standard operators that grow their KV cache, for optimum's runtime classes).
        model: Facts of the original model.
        plan: Ranks of every projection and stage.
        schedule: Token counts at which decoding moves on.
        dtype: Number format of the projections: ``float32``/``bfloat16``… in a checkpoint, ``fp32``, ``int8`` or
            ``int4`` in a bundle.
        factorization: ``one-sided`` or ``two-sided``.
        calibration: What the factors were fitted on; None for a keep of 1.
        stages: The exported stages of a bundle, empty in a checkpoint.
        operators: Version (kernels.py) of our own operators that a bundle's graphs consist of; 0: onnxruntime's.
        versions: Package versions that wrote the folder.
        files: Every other file of the folder; filled by :func:`seal`.
    """

    kind: Kind
    model: ModelInfo
    plan: RankPlan
    schedule: Schedule
    dtype: str
    factorization: str
    calibration: Calibration | None = None
    stages: tuple[StageInfo, ...] = ()
    operators: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileInfo] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _require(self.kind in get_args(Kind), f"kind {self.kind!r} is not {', '.join(get_args(Kind))}")
        _require(
            len(self.schedule.boundaries) == self.plan.num_stages - 1,
            f"{self.plan.num_stages} stages need {self.plan.num_stages - 1} schedule boundaries",
        )
        rows = self.schedule.divergence
        _require(
            not rows
            or (len(rows) == self.plan.num_stages and len({len(r) for r in rows}) == 1 and len(rows[0]) > 0),
            "schedule.divergence must hold one row a stage, all of one length",
        )
        expected = 0 if self.kind == "checkpoint" else self.plan.num_stages
        _require(len(self.stages) == expected, f"a {self.kind} of this plan has {expected} stage graphs")
        _require(len({s.graph for s in self.stages}) == expected, "two stages share a graph")
        _require(_is_count(self.operators), "operators must be a number from 0 on")
        _require(
            not self.operators or self.kind == "bundle", f"a {self.kind} has no graphs of our own operators"
        )

    def required_files(self) -> tuple[str, ...]:
        """Return the files without which the folder cannot be used; each must be listed in ``files``."""
        if self.kind == "checkpoint":
            return ("config.json", "tokenizer.json", "base.safetensors", "factors.safetensors")
        if self.kind == "portable":
            return (*(s.graph for s in self.stages), "weights.bin", "config.json", "tokenizer.json")
        graphs = [s.graph for s in self.stages]
        if self.kind == "static":  # compiled, its weights are elsewhere
            prefill = [prefill_graph(name) for name in graphs]
            return (*graphs, *prefill, "tokenizer.json", "tokenizer_config.json")
        return (*graphs, "weights.bin", "tokenizer.json", "tokenizer_config.json")

    def graph_form(self) -> GraphForm:
        """Return which operators the graphs of a bundle consist of."""
        return "static" if self.kind == "static" else "own" if self.operators else "stock"

    def weight_sizes(self) -> dict[str, int]:
        """Return the bytes of the files that stage graphs take weights and compiled parts from, by name."""
        return {name: info.size for name, info in self.files.items() if name.endswith(".bin")}


def prefill_graph(graph: str) -> str:
    """Return the name of the graph of a ``static`` stage that takes a piece of the prompt."""
    return f"{graph.removesuffix('.onnx')}.prefill.onnx"


def factor_parameters(shape: tuple[int, int], rank: int, *, storage: Storage = "plain") -> int:
    """Return the parameters of one chunk of ``rank`` ranks: ``r (m + n)``, pivoted ``r (m + n) - r²``."""
    m, n = shape
    return rank * (m + n) - (rank * rank if storage == "pivoted" else 0)


def break_even(shape: tuple[int, int], *, storage: Storage = "plain") -> int:
    """Return the largest rank whose factors hold fewer parameters than the matrix.

    Plain: ``r (m + n) < m n``. Pivoted factors are smaller at every rank below the full one.
    """
    m, n = shape
    return min(m, n) - 1 if storage == "pivoted" else (m * n - 1) // (m + n)


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Write ``flrc.json`` last, with size and SHA-256 of every file now in ``folder`` but the model card.

    Returns:
        The manifest as written.
    """
    files = {
        path.name: FileInfo(path.stat().st_size, sha256_of(path))
        for path in sorted(folder.iterdir())
        if path.name not in _UNLISTED
    }
    sealed = replace(manifest, files=files)
    write_json(folder / FILE_NAME, asdict(sealed))
    return sealed


_MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def _article(kind: Kind | None) -> str:
    return "a checkpoint or bundle" if kind is None else f"a {KIND_NAMES[kind]}"


def parse(folder: Path, kind: Kind | None = None) -> Manifest:
    """Read ``flrc.json`` alone; the files it names need not be there.

    Args:
        folder: As :func:`read`.
        kind: As :func:`read`.

    Raises:
        FormatError: The manifest is missing, damaged, of a newer format or of the other kind, or does not list a file
            that its kind needs.
        VerificationError: It names a file that is not a plain name.
    """
    if not folder.is_dir():
        raise FormatError(f"{folder} is not a folder", hint="give the folder that compress or export wrote")
    if not (folder / FILE_NAME).exists() and any((folder / name).is_file() for name in _MODEL_FILES):
        raise FormatError(
            f"{folder.name} is a Hugging Face model, not {_article(kind)}",
            hint=f"flrc-edge compress {folder} -o CHECKPOINT, then flrc-edge export CHECKPOINT -o BUNDLE",
        )
    if (folder / FILE_NAME).is_symlink():
        raise FormatError(f"{folder.name}: {FILE_NAME} is a link")
    raw = read_json(folder / FILE_NAME)
    if isinstance(raw, dict) and raw.get("schema_version") not in READABLE:
        raise FormatError(
            f"{folder.name} was written in format {raw.get('schema_version')}, this flrc-edge reads "
            f"{' and '.join(map(str, READABLE))}",
            hint="upgrade flrc-edge or write the folder again",
        )
    manifest = build(Manifest, raw, FILE_NAME)
    if CARD in manifest.files:  # folders written before the card was left out
        manifest = replace(manifest, files={n: f for n, f in manifest.files.items() if n != CARD})
    static_will_do = kind == "bundle" and manifest.kind == "static"
    if kind is not None and manifest.kind != kind and not static_will_do:
        raise FormatError(
            f"{folder.name} is a {KIND_NAMES[manifest.kind]}, not a {KIND_NAMES[kind]}",
            hint=_OPENED_ELSEWHERE if (manifest.kind, kind) == ("portable", "bundle") else _WRITERS[kind],
        )
    for name in manifest.files:
        check_name(folder, name)
    for name in manifest.required_files():
        if name not in manifest.files:
            raise FormatError(
                f"{folder.name}: {FILE_NAME} does not list {name}", hint="write the folder again"
            )
    return manifest


def read(folder: Path, kind: Kind | None = None) -> Manifest:
    """Read ``flrc.json`` and check that every file it names is there with its size.

    Args:
        folder: A checkpoint or bundle.
        kind: The kind the caller needs, or None for either.

    Raises:
        FormatError: The manifest is missing, damaged, of a newer format or of the other kind.
        VerificationError: A file is missing or has another size.
    """
    manifest = parse(folder, kind)
    for name, info in manifest.files.items():
        size = resolve_inside(folder, name).stat().st_size
        if size != info.size:
            raise VerificationError(
                f"{folder.name}: {name} has {size} bytes, {info.size} were written",
                hint="copy or write the folder again",
            )
    return manifest


def verify(folder: Path, kind: Kind | None = None) -> Manifest:
    """Read the manifest, compare the SHA-256 of every file and look into the graphs of a bundle.

    Raises:
        VerificationError: A file is missing, has another size or hash, or is not listed; ``genai_config.json`` says
            otherwise of the model than the manifest.
        FormatError: The manifest is damaged, or a graph holds what ``export`` does not write.
    """
    manifest = read(folder, kind)
    for path in sorted(folder.iterdir()):
        if path.name not in _UNLISTED and path.name not in manifest.files:
            raise VerificationError(f"{folder.name}: {path.name} is not listed in {FILE_NAME}")
    for name, info in manifest.files.items():
        if sha256_of(resolve_inside(folder, name)) != info.sha256:
            raise VerificationError(
                f"{folder.name}: checksum mismatch in {name}", hint="copy or write the folder again"
            )
    if manifest.kind in ("bundle", "static"):
        for name in manifest.files:
            if name.endswith(".onnx"):
                check_graph_file(resolve_inside(folder, name), manifest.weight_sizes(), manifest.graph_form())
        if GENAI_FILE in manifest.files:
            check_genai_file(folder, manifest)
    return manifest


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise FormatError(f"{FILE_NAME}: {message}")


def _is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
