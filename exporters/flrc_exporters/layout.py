"""Which matrices are stored as which tensors: rank chunks, stacked where they multiply the same input.

Everything that multiplies the same input and is read by the same stages (dense matrices, first factors) is
stacked into one product, because decoding pays for every small operator.
"""

from __future__ import annotations

from dataclasses import dataclass

from flrc_runtime.manifest import ProjectionPlan, RankPlan

from .architectures import DecoderConfig


@dataclass(frozen=True)
class Part:
    """Rows of a stacked product: a dense projection (``chunk`` None) or ranks ``[start, stop)`` of a V."""

    projection: ProjectionPlan
    index: int = 0  # of the chunk within its projection
    chunk: tuple[int, int] | None = None

    @property
    def rows(self) -> int:
        """Rows the part takes in the stack."""
        return self.projection.shape[0] if self.chunk is None else self.chunk[1] - self.chunk[0]

    @property
    def short_name(self) -> str:
        """Name of the projection inside its layer half, such as ``q_proj``."""
        return self.projection.name.rpartition(".")[2]


@dataclass(frozen=True)
class Block:
    """A stacked product that stages up to ``last_stage`` read; ``name`` is ``V``, ``V_1``, … or empty."""

    name: str
    last_stage: int
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        """Output features of the product."""
        return sum(part.rows for part in self.parts)


@dataclass(frozen=True)
class GroupLayout:
    """The projections that read one input, and the products they are stored as."""

    name: str  # such as model.layers.0.self_attn.qkv_proj
    projections: tuple[ProjectionPlan, ...]
    blocks: tuple[Block, ...]

    @property
    def dense(self) -> bool:
        """Whether every projection of the group keeps its full matrix."""
        return all(p.dense for p in self.projections)

    @property
    def in_features(self) -> int:
        """Input features of the group."""
        return self.projections[0].shape[1]

    def blocks_at(self, stage: int) -> tuple[Block, ...]:
        """Return the products that ``stage`` reads."""
        return tuple(block for block in self.blocks if block.last_stage >= stage)


def group_layouts(config: DecoderConfig, plan: RankPlan) -> dict[str, GroupLayout]:
    """Return the layout of every input group, by name, in the order of the model."""
    plans = plan.by_name()
    groups: dict[str, list[ProjectionPlan]] = {}
    for projection in config.projections():
        groups.setdefault(f"{projection.group}_proj", []).append(plans[projection.name])
    return {name: _layout(name, tuple(members), plan.num_stages) for name, members in groups.items()}


def _layout(name: str, members: tuple[ProjectionPlan, ...], num_stages: int) -> GroupLayout:
    by_stage: dict[int, list[Part]] = {}
    for member in members:
        if member.dense:
            by_stage.setdefault(num_stages - 1, []).append(Part(member))
        for index, (start, stop) in enumerate(member.chunks()):
            last = max(s for s, rank in enumerate(member.ranks) if rank is not None and rank >= stop)
            by_stage.setdefault(last, []).append(Part(member, index, (start, stop)))
    dense = all(member.dense for member in members)
    blocks = tuple(
        Block("" if dense else _numbered("V", i), last, tuple(by_stage[last]))
        for i, last in enumerate(sorted(by_stage, reverse=True))
    )
    return GroupLayout(name, members, blocks)


def _numbered(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name


def output_factor_name(index: int) -> str:
    """Return the name of the second factor of a chunk: ``U``, ``U_1`` and so on."""
    return _numbered("U", index)
