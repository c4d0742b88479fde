"""Which matrices are stored as which tensors: rank chunks, stacked where they multiply the same input.

Everything that multiplies the same input, is read by the same stages (dense matrices, first factors) and has the
same number format is stacked into one product, because decoding pays for every small operator.
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
    def format(self) -> str:
        """Name of its number format."""
        return self.projection.format_of("weight" if self.chunk is None else f"chunks.{self.index}.V")

    @property
    def short_name(self) -> str:
        """Name of the projection inside its layer half, such as ``q_proj``."""
        return self.projection.name.rpartition(".")[2]


@dataclass(frozen=True)
class Block:
    """A stacked product that stages up to ``last_stage`` read; ``name`` is ``V``, ``V_1``, … or empty.

    Its parts share one number format (``format``, a name such as ``int4/32``).
    """

    name: str
    last_stage: int
    format: str
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
        """Whether the group is one matrix: every projection keeps its full one, in the same number format."""
        return self.blocks[0].name == ""

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


def single_layout(projection: ProjectionPlan, num_stages: int) -> GroupLayout:
    """Return the layout of a projection that shares its input's products with no other."""
    return _layout(projection.name, (projection,), num_stages)


def _layout(name: str, members: tuple[ProjectionPlan, ...], num_stages: int) -> GroupLayout:
    stacks: dict[tuple[int, str], list[Part]] = {}  # by last stage that reads it, and number format
    for member in members:
        if member.dense:
            part = Part(member)
            stacks.setdefault((num_stages - 1, part.format), []).append(part)
        for index, (start, stop) in enumerate(member.chunks()):
            last = max(s for s, rank in enumerate(member.ranks) if rank is not None and rank >= stop)
            part = Part(member, index, (start, stop))
            stacks.setdefault((last, part.format), []).append(part)
    whole = len(stacks) == 1 and all(member.dense for member in members)
    blocks = tuple(
        Block("" if whole else _numbered("V", i), *key, tuple(stacks[key]))
        for i, key in enumerate(sorted(stacks, key=lambda key: -key[0]))
    )
    return GroupLayout(name, members, blocks)


def _numbered(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name


def output_factor_name(index: int) -> str:
    """Return the name of the second factor of a chunk: ``U``, ``U_1`` and so on."""
    return _numbered("U", index)
