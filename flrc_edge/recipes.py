"""What ``compare`` measures side by side: each recipe is a way to factor, to choose ranks and to store.

Light: the command line lists the names without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from flrc_edge.allocation import Allocator, Score
    from flrc_runtime.manifest import Storage

Factorization = Literal["svd", "asvd", "one-sided", "two-sided"]


@dataclass(frozen=True)
class Recipe:
    """One way to compress.

    Args:
        name: As tables and ``--recipe`` call it.
        factorization: How the factors are fitted; ``svd`` and ``asvd`` are baselines' own.
        allocator: What chooses the ranks; ``asvd`` is its search by measured perplexity.
        score: Fisher score of the allocator ``fisher``.
        storage: How the factors are stored.
        corrected: Whether they are fitted again to what the compressed layers before them have lost.
    """

    name: str
    factorization: Factorization
    allocator: Allocator | Literal["asvd"]
    score: Score = "gw2"
    storage: Storage = "plain"
    corrected: bool = False

    @property
    def ranks(self) -> str:
        """What chooses the ranks, in a word or two."""
        return f"{self.allocator} {self.score}" if self.allocator == "fisher" else self.allocator

    def stored(self, storage: Storage) -> Recipe:
        """Return the same recipe with another storage form, which its name then tells."""
        if storage == self.storage:
            return self
        return replace(self, name=f"{self.name}-{storage}", storage=storage)


REFERENCE = "svd-llm"  # every other recipe's growth of ln ppl is divided by this one's
RECIPES = (
    Recipe("svd", "svd", "uniform"),
    Recipe("asvd", "asvd", "asvd"),
    Recipe(REFERENCE, "one-sided", "uniform"),
    Recipe("flra-gw2", "one-sided", "fisher", "gw2"),
    Recipe("flra-gw2-rms", "one-sided", "fisher", "gw2-rms"),
    Recipe("flra-g2-sum", "one-sided", "fisher", "g2-sum"),
    Recipe("flra-g2-mean", "one-sided", "fisher", "g2-mean"),
    Recipe("flra-g2-rms", "one-sided", "fisher", "g2-rms"),
    Recipe("flra-gw2-two-sided", "two-sided", "fisher", "gw2"),
    Recipe("spectrum-one-sided", "one-sided", "spectrum"),
    Recipe("spectrum-two-sided", "two-sided", "spectrum"),
    Recipe("measured-two-sided", "two-sided", "measured"),
    Recipe("measured-two-sided-corrected", "two-sided", "measured", corrected=True),
    Recipe("search-two-sided", "two-sided", "search"),
)
