"""What a projection is in the graphs of our own operators: a sum of parts, of which a stage reads the first ones.

A part is the matrix itself, a pair of plain factors (a stage may read any first ranks of it), or a pivoted pair (read
whole or not at all). Rank chunks of plain factors are laid side by side, so that they are one pair.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flrc_runtime.manifest import ProjectionPlan

from .number_format import NumberFormat
from .tiles import BLOCK, tile_bytes


@dataclass(frozen=True)
class Part:
    """One part of a projection.

    Args:
        projection: Its plan.
        index: Of the part within the projection.
        chunks: The rank chunks it is made of; none of a dense projection.
        format: Number format of the matrix, or of V.
        second_format: Of U; None for the matrix itself, which a pivoted chunk of all ranks is as well.
    """

    projection: ProjectionPlan
    index: int
    chunks: tuple[int, ...]
    format: NumberFormat
    second_format: NumberFormat | None = None

    @property
    def pivoted(self) -> bool:
        """Whether V holds rows of the product itself and U combinations of them."""
        return self.second_format is not None and self.projection.storage == "pivoted"

    @property
    def start(self) -> int:
        """The first of its ranks within the projection."""
        return self.projection.chunks()[self.chunks[0]][0]

    @property
    def ranks(self) -> int:
        """Ranks that are stored; 0 for the matrix itself."""
        return sum(self.widths()) if self.second_format is not None else 0

    def widths(self) -> tuple[int, ...]:
        """Return the ranks of every chunk."""
        chunks = self.projection.chunks()
        return tuple(chunks[i][1] - chunks[i][0] for i in self.chunks)

    def ranks_at(self, stage: int) -> int:
        """Return the ranks that a stage reads; 0 where it reads none."""
        rank = self.projection.ranks[stage]
        return 0 if rank is None else max(0, min(rank - self.start, self.ranks))

    def read_at(self, stage: int) -> bool:
        """Return whether a stage reads anything of it."""
        rank = self.projection.ranks[stage]
        return rank is None or rank > self.start

    def matrices(self) -> dict[str, tuple[tuple[int, int], NumberFormat]]:
        """Return shape and number format of what is stored, by module name within the projection."""
        m, n = self.projection.shape
        suffix = f"_{self.index}" if self.index else ""
        if self.second_format is None:
            return {f".V{suffix}" if self.chunks else "": ((m, n), self.format)}
        rows = m - self.ranks if self.pivoted else m
        return {
            f".V{suffix}": ((self.ranks, n), self.format),
            f".U{suffix}": ((rows, self.ranks), self.second_format),
        }

    def bytes_at(self, stage: int) -> int:
        """Return the bytes of weights that a stage reads of it: the first rows of V, the first columns of U."""
        if not self.read_at(stage):
            return 0
        (first, *rest), ranks = self.matrices().values(), self.ranks_at(stage)
        rows, inputs = first[0]
        size = tile_bytes(ranks or rows, inputs, first[1].bits)
        return size + sum(tile_bytes(shape[0], ranks, fmt.bits) for shape, fmt in rest)


def parts_of(plan: ProjectionPlan) -> tuple[Part, ...]:
    """Return the parts of a projection, those that all stages read first."""
    if plan.dense:
        return (Part(plan, 0, (), NumberFormat.named(plan.format_of("weight"))),)

    def formats(chunk: int) -> tuple[str, str]:
        return plan.format_of(f"chunks.{chunk}.V"), plan.format_of(f"chunks.{chunk}.U")

    runs: list[list[int]] = []
    for chunk, (start, _) in enumerate(plan.chunks()):
        if runs and plan.storage == "plain" and formats(runs[-1][0]) == formats(chunk):
            before = start - plan.chunks()[runs[-1][0]][0]
            if before % BLOCK == 0:  # else a block of U's inputs would belong to both
                runs[-1].append(chunk)
                continue
        runs.append([chunk])
    parts = []
    for i, run in enumerate(runs):
        v, u = (NumberFormat.named(name) for name in formats(run[0]))
        part = Part(plan, i, tuple(run), v, u)
        whole = (
            part.pivoted and part.ranks == plan.shape[0]
        )  # rows of the matrix, and no combinations of them
        parts.append(replace(part, second_format=None) if whole else part)
    return tuple(parts)
