"""How to compress: everything that ``compress`` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from flrc_edge import allocation
from flrc_edge.allocation import Allocator, Score
from flrc_edge.errors import UsageError
from flrc_edge.factorization import Method
from flrc_edge.texts import WeightedText
from flrc_edge.token_loss import Labels
from flrc_exporters.number_format import Integers
from flrc_runtime.manifest import Storage

Numbers = Literal["float", "mixed", Integers]
# A mixture: factors fitted to one kind of text alone fail on others. With half of it chat, KL to SmolLM2-135M's own
# answers falls from 0.31 to 0.15 at keep .9, against no chat at all.
DEFAULT_TEXTS = (WeightedText("chat", 0.5), WeightedText("wikitext2", 0.25), WeightedText("austen", 0.25))


def default_storage(dtype: str) -> Storage:
    """Return how factors are stored best at equal bytes, if nothing else is asked."""
    return "plain" if dtype.startswith("int4") else "pivoted"


@dataclass(frozen=True)
class Settings:
    """How to compress.

    Args:
        keep: Share of projection parameters of each stage, in (0, 1], falling; the first is what is stored.
        sizes: Bytes that each stage's graph may read of the exported weight file, falling, the first being the size
            of that file; instead of ``keep``.
        allocator: ``measured``, ``search``, ``spectrum``, ``fisher`` or ``uniform``.
        score: Fisher score of the allocator ``fisher``.
        factorization: ``two-sided`` (gradient-aware) or ``one-sided`` (activation-aware).
        labels: What the gradients of the statistics predict: tokens ``sampled`` from the model, or the ``text``.
        correct: Fit factors again to what the compressed layers before them have lost (correction.py).
        dtype: ``float`` keeps the model's dtype; ``int8`` and ``int4`` (``int4/128``: a scale in 128 inputs instead of
            32) round with compensation (quantization.py);
            ``mixed`` chooses the format of every matrix together with its rank, for ``sizes`` (bit_allocation.py).
        head: Number format of embedding and head of a checkpoint of integers, but for ``mixed``.
        storage: ``pivoted`` (r rows and the others as their combinations) or ``plain`` (two factors). None: plain for
            4 bits, which pivoted rows do not take well (docs/how-it-works.md), else pivoted.
        texts: Calibration texts and their weights.
        tokens: Calibration tokens; at least 16 a feature of the widest input are advised.
        window: Tokens a calibration window; the model's context if that is shorter.
        seed: Chooses the windows.
        rank_step: Ranks are multiples of it.
        boundaries: Token counts at which decoding moves on; None measures them.
        reuse_statistics: Take statistics of the same fingerprint from the cache, and put new ones there.
    """

    keep: tuple[float, ...] = (0.95, 0.9, 0.85)
    sizes: tuple[int, ...] = ()
    allocator: Allocator = "measured"
    score: Score = "gw2"
    factorization: Method = "two-sided"
    labels: Labels = "sampled"
    correct: bool = False
    dtype: Numbers = "float"
    head: Integers = "int8"
    storage: Storage | None = None
    texts: tuple[WeightedText, ...] = DEFAULT_TEXTS
    tokens: int = 32 * 1024
    window: int = 1024
    seed: int = 0
    rank_step: int = allocation.RANK_STEP
    boundaries: tuple[int, ...] | None = None
    reuse_statistics: bool = True

    def __post_init__(self) -> None:
        allocation.check_keep(self.keep)
        kinds = {
            "allocator": Allocator,
            "score": Score,
            "factorization": Method,
            "labels": Labels,
            "storage": Storage,
            "dtype": Numbers,
            "head": Integers,
        }
        for name, kind in kinds.items():
            if getattr(self, name) not in (*get_args(kind), *([None] if name == "storage" else [])):
                raise UsageError(f"{name} {getattr(self, name)!r} is not one of {', '.join(get_args(kind))}")
        for name, least in (("tokens", 2), ("window", 2), ("rank_step", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not self.texts:
            raise UsageError("name at least one calibration text")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must lie between 0 and 2^63 - 1, not {self.seed}")
        if self.tokens < self.window:
            raise UsageError(f"{self.tokens} calibration tokens do not fill one window of {self.window}")
        if self.dtype == "mixed" and not self.sizes:
            raise UsageError(
                "mixed number formats are chosen for a size in bytes",
                hint="give a size (--target-size), or name one number format",
            )
        if self.sizes and self.allocator not in ("measured", "spectrum"):
            raise UsageError(
                f"the allocator {self.allocator} does not say what a rank costs in nats, so it cannot meet a size",
                hint="use measured or spectrum with a size",
            )
        if self.boundaries is not None:
            if len(self.boundaries) != self.num_stages - 1:
                raise UsageError(f"{self.num_stages} stages need {self.num_stages - 1} boundaries")
            if any(b < 1 for b in self.boundaries) or list(self.boundaries) != sorted(self.boundaries):
                raise UsageError("boundaries must be at least 1 and must not fall")

    @property
    def num_stages(self) -> int:
        """How many stages a plan of these settings has."""
        return len(self.sizes or self.keep)

    @property
    def stored(self) -> Storage:
        """How factors are stored: ``storage`` or its default."""
        return self.storage or default_storage(self.dtype)

    @property
    def storages(self) -> tuple[Storage, ...]:
        """The forms that factors may have where a size in bytes decides: pivoted allows plain ones, too."""
        return ("plain",) if self.stored == "plain" else ("plain", "pivoted")
