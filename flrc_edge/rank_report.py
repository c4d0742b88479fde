"""What ``flrc-edge report`` shows of a checkpoint or bundle: its figures, a sentence on each, and their numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flrc_edge.errors import FormatError
from flrc_edge.figures.canvas import check_matplotlib
from flrc_edge.figures.curves import draw_healing, healing_series
from flrc_edge.figures.loss_maps import draw_loss_curves
from flrc_edge.figures.maps import draw_bits, draw_importance, draw_shares
from flrc_edge.figures.rank_map import Grid, RankMap, rank_map
from flrc_edge.figures.stages import draw_divergence, draw_kept
from flrc_edge.html_report import AnswerSection, Table, html_page
from flrc_edge.loss_curves import LossCurves
from flrc_edge.progress import Progress, silent
from flrc_edge.report_parts import Part
from flrc_edge.stage_report import Measured, measured_parts
from flrc_runtime.manifest import Manifest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RankReport:
    """The page, and its figures by name."""

    html: str
    figures: Mapping[str, Figure]


def rank_report(
    content: Manifest,
    *,
    measured: Measured | None = None,
    curves: LossCurves | None = None,
    healing: Sequence[Mapping[str, Any]] = (),
    progress: Progress = silent,
) -> RankReport:
    """Draw everything that is known of a checkpoint or bundle; what is not known is named on the page.

    Args:
        content: Its manifest.
        measured: What was measured of its stages.
        curves: What every rank was found to cost (``losses.json``).
        healing: The runs of ``healing.json``.
        progress: Called after each figure.

    Raises:
        MissingPackageError: matplotlib is not installed.
        FormatError: The projections are not those of decoder layers, or a number is too large to be drawn.
    """
    check_matplotlib()
    ranks = rank_map(content.plan)
    try:
        with np.errstate(all="ignore"):  # numbers near the limits of float64 are refused below
            parts = _parts(ranks, content, measured, curves, healing)
            sections = []
            for done, part in enumerate(parts, 1):
                sections.append(part.section() if isinstance(part, Part) else part)
                progress("figures", done, len(parts))
    except (ValueError, OverflowError) as error:
        raise FormatError(f"the manifest holds numbers that cannot be drawn: {error}") from error
    html = html_page(
        content.model.name,
        _lead(content),
        facts=_facts(content),
        summary=_stages(content),
        sections=sections,
        notes=_notes(ranks, content, measured, curves),
    )
    return RankReport(html, {part.name: part.figure for part in parts if isinstance(part, Part)})


def _notes(
    ranks: RankMap, content: Manifest, measured: Measured | None, curves: LossCurves | None
) -> list[str]:
    notes = []
    if not ranks.scored:
        notes.append("Importance is not shown: the manifest holds no Fisher scores.")
    if curves is None:
        notes.append(
            "What every rank costs is not shown: a bundle does not hold it, its checkpoint does."
            if content.kind != "checkpoint"
            else "What every rank costs is not shown: this checkpoint holds no losses.json."
        )
    if content.plan.num_stages > 1 and not content.schedule.divergence:
        notes.append("Divergence is not shown: the boundaries were given by hand, not measured.")
    if measured is None:
        notes.append(
            "Quality, speed, memory and answers are not shown: flrc-edge report --measure measures them."
        )
    elif measured.speed is None:
        notes.append("Speed, memory and answers are not shown: a checkpoint has no graphs, its bundle does.")
    return notes


def _parts(
    ranks: RankMap,
    content: Manifest,
    measured: Measured | None,
    curves: LossCurves | None,
    healing: Sequence[Mapping[str, Any]],
) -> list[Part | AnswerSection]:
    parts: list[Part | AnswerSection] = [] if measured is None else measured_parts(measured)
    if ranks.scored:
        parts.append(_importance(ranks))
    if curves is not None:
        parts.append(_losses(ranks, curves))
    parts.append(_shares(ranks, content))
    if len({name for p in content.plan.projections for name in p.formats}) > 1:
        parts.append(_bits(ranks, content))
    if content.plan.num_stages > 1:
        parts.append(_kept(ranks, content))
    if content.schedule.divergence:
        parts.append(_divergence(content))
    parts += [_healing(i, len(healing), run) for i, run in enumerate(healing)]
    return parts


def _importance(ranks: RankMap) -> Part:
    scores = ranks.scores[ranks.scores > 0]
    return Part(
        "importance",
        "Importance",
        "The Fisher score of every projection (rows) in every layer (columns) on a log scale: the largest is that of "
        f"{_place(ranks, ranks.scores, np.nanargmax)}, {_times(float(scores.max() / np.median(scores)))} the median, "
        f"and per parameter that of {_place(ranks, ranks.per_parameter, np.nanargmax)}.",
        f"Two heat maps, {len(ranks.kinds)} kinds of projection by {len(ranks.layers)} layers: Fisher score, and "
        "Fisher score per parameter. The numbers are in the tables below.",
        draw_importance(ranks),
        (
            _layer_table(ranks, "Fisher score", lambda k, i: _number(ranks.scores[k, i])),
            _layer_table(
                ranks,
                "Fisher score per million parameters",
                lambda k, i: _number(1e6 * ranks.per_parameter[k, i]),
            ),
        ),
    )


def _losses(ranks: RankMap, curves: LossCurves) -> Part:
    middle = {name: c.losses[len(c.losses) // 2] for name, c in curves.projections.items()}
    grid = np.array([[middle.get(p.name, np.nan) if p else np.nan for p in row] for row in ranks.projections])

    def cell(kind: int, layer: int) -> str:
        p = ranks.projections[kind][layer]
        curve = curves.projections.get(p.name) if p is not None else None
        if curve is None:
            return "–"
        return f"{_number(curve.losses[len(curve.losses) // 2])} at {curve.ranks[len(curve.ranks) // 2]}"

    return Part(
        "losses",
        "What every rank costs",
        f"The growth of the token loss, {curves.source}, if one projection alone is cut, over the share of its "
        "parameters that is kept: a line for each layer, a dot where stage 0 is. At two fifths of the largest rank "
        f"{_place(ranks, grid, np.nanargmax)} loses most, {_number(float(np.nanmax(grid)))} nats.",
        f"{len(ranks.kinds)} line charts on a log scale, a line for each of {len(ranks.layers)} layers. One value of "
        "each line is in the table below.",
        draw_loss_curves(ranks, curves),
        (_layer_table(ranks, "Growth of the token loss (nats) at a rank", cell),),
    )


def _healing(number: int, runs: int, run: Mapping[str, Any]) -> Part:
    series = healing_series(run["curve"])
    minutes = series[0].x
    moves = ", ".join(f"{s.name} from {s.y[0]:.3f} to {s.y[-1]:.3f}" for s in series)
    which = "" if runs == 1 else f", run {number + 1} of {runs}"
    return Part(
        "healing" if runs == 1 else f"healing-{number + 1}",
        f"Healing{which}",
        f"Mean KL to the dense model on text that was not trained on, over {minutes[-1]:.0f} minutes of training: "
        f"{moves} nats a token.",
        f"Line chart, a line for each of {len(series)} stages. The numbers are in the table below.",
        draw_healing(series),
        (
            Table(
                "Mean KL in nats a token",
                ("minutes", *(s.name for s in series)),
                tuple((f"{m:.1f}", *(f"{s.y[i]:.4f}" for s in series)) for i, m in enumerate(minutes)),
            ),
        ),
    )


def _shares(ranks: RankMap, content: Manifest) -> Part:
    plan = content.plan
    last = plan.num_stages - 1
    smallest = ranks.shares[last]
    where = _place(ranks, smallest, np.nanargmin)
    dense = sum(p.dense for p in plan.projections)
    pivoted = sum(p.storage == "pivoted" for p in plan.projections if not p.dense)
    several = plan.num_stages > 1
    kept = f"the smallest share is {np.nanmin(smallest):.2f}, {where}" + (
        f" at stage {last}" if several else ""
    )
    sentence = (
        f"The share of its parameters that every projection keeps{' at each stage' if several else ''}: "
        f"{f'{dense} of {len(plan.projections)} stay dense (dots)' if dense else 'none stays dense'}"
        + (f", {pivoted} are pivoted" if pivoted else "")
        + (f", and {kept}." if dense < len(plan.projections) else ".")
    )

    def cell(stage: int) -> Callable[[int, int], str]:
        def text(kind: int, layer: int) -> str:
            p = ranks.projections[kind][layer]
            if p is None or p.dense:
                return "–" if p is None else "dense"
            return f"{p.ranks[stage]} ({ranks.shares[stage][kind, layer]:.2f})"

        return text

    return Part(
        "ranks",
        "Ranks",
        sentence,
        f"{plan.num_stages} heat map{'s' if several else ''}, {len(ranks.kinds)} kinds of projection by "
        f"{len(ranks.layers)} layers: share of parameters kept. The numbers are in the tables below.",
        draw_shares(ranks, [plan.kept(s) for s in range(plan.num_stages)]),
        tuple(
            _layer_table(ranks, f"Rank (share of parameters kept), stage {s}", cell(s))
            for s in range(plan.num_stages)
        ),
    )


def _bits(ranks: RankMap, content: Manifest) -> Part:
    sizes: dict[str, int] = {}
    for p in content.plan.projections:
        for name, (rows, columns) in zip(p.formats, p.matrices().values(), strict=True):
            sizes[name] = sizes.get(name, 0) + rows * columns
    stored = sum(sizes.values())
    shares = [(name, sizes[name], sizes[name] / stored) for name in sorted(sizes, key=lambda n: -sizes[n])]
    return Part(
        "bits",
        "Number formats",
        "The mean bits of a stored parameter of every projection, scales not counted (int4/32 has one scale for 32 "
        "parameters): " + ", ".join(f"{share:.1%} are {name}" for name, _, share in shares) + ".",
        f"Heat map, {len(ranks.kinds)} kinds of projection by {len(ranks.layers)} layers: bits of a stored parameter. "
        "The numbers are in the tables below.",
        draw_bits(ranks),
        (
            Table(
                "Stored parameters of the projections by number format",
                ("format", "parameters", "share"),
                tuple((name, f"{size:,}", f"{share:.4f}") for name, size, share in shares),
            ),
            _layer_table(ranks, "Mean bits of a stored parameter", lambda k, i: _number(ranks.bits[k, i])),
        ),
    )


def _kept(ranks: RankMap, content: Manifest) -> Part:
    plan = content.plan
    kept = [ranks.kept(s) for s in range(plan.num_stages)]
    loser = max(ranks.kinds, key=lambda kind: kept[0][kind] - kept[-1][kind])
    return Part(
        "kept-by-stage",
        "What the stages leave out",
        "The share of parameters that each kind of projection keeps over all layers at each stage (attention blue, "
        f"MLP orange): {loser} gives up most, from {kept[0][loser]:.2f} to {kept[-1][loser]:.2f}.",
        f"Line chart, a line for each of {len(ranks.kinds)} kinds of projection and one for all, over "
        f"{plan.num_stages} stages. The numbers are in the table below.",
        draw_kept(ranks, [plan.kept(s) for s in range(plan.num_stages)]),
        (
            Table(
                "Share of parameters kept",
                ("projection", *(f"stage {s}" for s in range(plan.num_stages))),
                (
                    *((kind, *(f"{k[kind]:.3f}" for k in kept)) for kind in ranks.kinds),
                    ("all", *(f"{plan.kept(s):.3f}" for s in range(plan.num_stages))),
                ),
            ),
        ),
    )


def _divergence(content: Manifest) -> Part:
    rows, block = content.schedule.divergence, max(content.schedule.block, 1)
    means = [sum(row) / len(row) for row in rows]
    context = content.model.context_length
    moves = ", ".join(str(b) for b in content.schedule.boundaries if b < context)
    thick = f"; lines are thick where the schedule uses the stage, which moves on at {moves}" if moves else ""
    return Part(
        "divergence",
        "What the stages cost",
        "The mean KL to the dense model at each position of its own answers, measured with the prompt read by stage 0"
        f"{thick}: over all positions " + ", ".join(f"{m:.3f}" for m in means) + " nats a token.",
        f"Step chart, a line for each of {len(rows)} stages over {len(rows[0]) * block} answer positions. The numbers "
        "are in the table below.",
        draw_divergence(content.schedule),
        (
            Table(
                "Mean KL(dense ‖ stage) in nats a token",
                ("positions", *(f"stage {s}" for s in range(len(rows)))),
                tuple(
                    (f"{i * block} to {(i + 1) * block - 1}", *(f"{row[i]:.4f}" for row in rows))
                    for i in range(len(rows[0]))
                ),
            ),
        ),
    )


def _lead(content: Manifest) -> str:
    plan, size = content.plan, sum(f.size for f in content.files.values())
    stages = "one stage" if plan.num_stages == 1 else f"{plan.num_stages} stages"
    return (
        f"A {content.kind} of {stages}, {content.dtype}, {size / 1e6:.1f} MB; ranks chosen by {plan.allocator}, "
        f"{plan.kept(0):.1%} of the projections' parameters kept."
    )


def _stages(content: Manifest) -> Table:
    plan, schedule = content.plan, content.schedule
    firsts = [schedule.first_token(s, content.model.context_length) for s in range(plan.num_stages)]
    starts = ["never" if first is None else first for first in firsts]
    header = ["stage", "keep asked", "kept", "parameters", "from token"]
    rows = [
        [str(s), f"{plan.keep[s]:g}", f"{plan.kept(s):.4f}", f"{plan.activated(s):,}", str(starts[s])]
        for s in range(plan.num_stages)
    ]
    if content.stages:
        header.append("MB read a token")
        for row, stage in zip(rows, content.stages, strict=True):
            row.append(f"{stage.bytes / 1e6:.1f}")
    caption = f"Of {plan.dense_parameters:,} parameters in {len(plan.projections)} projections"
    return Table(caption, tuple(header), tuple(map(tuple, rows)))


def _facts(content: Manifest) -> list[tuple[str, str]]:
    model, size = content.model, sum(f.size for f in content.files.values())
    facts = [
        (
            "Model",
            f"{model.name}: {model.architecture}, {model.parameters:,} parameters, {model.num_layers} layers of "
            f"{model.hidden_size} features, vocabulary of {model.vocab_size:,}",
        ),
        (
            "Files",
            f"{content.kind}, {content.dtype}, {size:,} bytes in {len(content.files)} files and flrc.json",
        ),
        ("Ranks", f"allocator {content.plan.allocator}, factors {content.factorization}"),
    ]
    if content.plan.embedding:
        formats = sorted({name for p in content.plan.projections for name in p.formats})
        facts.append(
            ("Numbers", f"projections {', '.join(formats)}; embedding and head {content.plan.embedding}")
        )
    calibration = content.calibration
    if calibration is not None:
        texts = ", ".join(f"{t.name} ({t.tokens:,} tokens)" for t in calibration.texts)
        facts += [
            (
                "Calibration",
                f"{texts}; {calibration.tokens:,} tokens in windows of {calibration.window}, seed {calibration.seed}",
            ),
            ("Fingerprint", calibration.fingerprint),
        ]
    if content.versions:
        facts.append(
            ("Versions", ", ".join(f"{name} {version}" for name, version in content.versions.items()))
        )
    return facts


def _layer_table(ranks: RankMap, caption: str, cell: Callable[[int, int], str]) -> Table:
    """Return a table with a row a layer and a column a kind; ``cell`` takes their places in the map."""
    return Table(
        caption,
        ("layer", *ranks.kinds),
        tuple(
            (str(layer), *(cell(k, i) for k in range(len(ranks.kinds))))
            for i, layer in enumerate(ranks.layers)
        ),
    )


def _place(ranks: RankMap, values: Grid, extreme: Callable[[Grid], np.intp]) -> str:
    kind, layer = np.unravel_index(extreme(values), values.shape)
    return f"{ranks.kinds[kind]} of layer {ranks.layers[layer]}"


def _number(value: float) -> str:
    """Return three significant digits, in full unless that takes many zeros."""
    if np.isnan(value):
        return "–"
    return f"{float(f'{value:.3g}'):,.10g}" if 1e-3 <= abs(value) < 1e7 else f"{value:.3g}"


def _times(ratio: float) -> str:
    return f"{ratio:.3g} times" if ratio < 1000 else f"{ratio:,.0f} times"
