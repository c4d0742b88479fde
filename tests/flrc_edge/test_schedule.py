"""The planned schedule: chosen on one half of the answers, validated on the other, the control if it does not pay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import flrc_edge
from flrc_edge import schedule as planning
from flrc_edge.boundaries import choose, constant
from flrc_edge.decoding import Answer, prompt_ids
from flrc_edge.divergence import dense_log_probs, schedule_divergence, token_divergence
from flrc_edge.schedule import built_in_prompts, plan_schedule, reference_answers
from flrc_edge.validation import Measured, Validation, neighbours, validate
from flrc_runtime.manifest import Schedule

HORIZON, BLOCK, END = 40, 8, 512


@pytest.fixture(scope="module")
def measured(compressed_stories: Any) -> tuple[Any, list[Answer], list[torch.Tensor], list[float]]:
    """The compressed model, five answers of 40, 33, 26, 19 and 1 tokens, their log-probabilities, the shares."""
    loaded, plan = compressed_stories.source, compressed_stories.manifest.plan
    full = reference_answers(loaded.model, loaded.tokenizer, built_in_prompts()[2:7], context=512, horizon=40)
    cut = [Answer(a.prompt, a.answer[:, :n]) for a, n in zip(full, (40, 33, 26, 19, 1), strict=True)]
    model = flrc_edge.load(compressed_stories.checkpoint)
    return model, cut, dense_log_probs(loaded.model, cut), [plan.kept(s) for s in range(3)]


def test_built_in_prompts(stories: Any) -> None:
    prompts = built_in_prompts()
    assert len(prompts) == len(set(prompts)) == 16 and all(p.strip() == p for p in prompts)
    # Both halves ask for short answers and for long ones.
    for half in (prompts[::2], prompts[1::2]):
        assert sum("1 or 2 sentences" in p for p in half) == 2 and sum("3 sentences" in p for p in half) == 1


def test_prompts_that_leave_no_room_are_left_out(compressed_stories: Any) -> None:
    loaded = compressed_stories.source
    prompts = ["A dog", "A dog and a cat and a bird went out to play in the big green garden", "A cat"]
    sizes = [prompt_ids(loaded.tokenizer, p).shape[1] for p in prompts]
    found = reference_answers(loaded.model, loaded.tokenizer, prompts, context=max(sizes) + 7, horizon=8)
    assert [a.prompt.shape[1] for a in found] == [sizes[0], sizes[2]]
    found = reference_answers(loaded.model, loaded.tokenizer, prompts, context=max(sizes) + 8, horizon=8)
    assert [a.prompt.shape[1] for a in found] == sizes


def test_validation_against_the_single_measurements(measured: Any) -> None:
    model, reference, dense, kept = measured
    done: list[tuple[str, int, int]] = []
    schedule = Schedule((8, 16))
    found = validate(
        model, reference, dense, schedule=schedule, kept=kept, progress=lambda *step: done.append(step)
    )
    stages = [schedule.stage_at(t) for n in (40, 33, 26, 19) for t in range(1, n)]
    share = sum(kept[s] for s in stages) / len(stages)
    assert found.schedule.share == found.constant.share == found.reversed.share == pytest.approx(share)
    assert (found.answers, found.tokens) == (5, 119) and done[-1] == ("schedule", 5, 5)
    assert found.schedule.kl == pytest.approx(
        schedule_divergence(model, reference, dense, schedule.stage_at), rel=1e-6
    )
    total = 0.0
    for a, d in zip(reference, dense, strict=True):
        script = [0, *reversed([schedule.stage_at(t) for t in range(1, a.length)])]
        total += float(token_divergence(model, a, d, script.__getitem__).sum())
    assert found.reversed.kl == pytest.approx(total / 119, rel=1e-6)
    # The share lies between stages 1 and 2; so does the constant stage's divergence, below the straight line.
    assert kept[2] < share < kept[1]
    ends = [schedule_divergence(model, reference, dense, constant(s, 3, end=END).stage_at) for s in (1, 2)]
    weight = (share - kept[2]) / (kept[1] - kept[2])
    assert ends[0] < found.constant.kl < weight * ends[0] + (1 - weight) * ends[1] < ends[1]
    assert found.gain == pytest.approx(found.constant.kl - found.schedule.kl) and found.gain_error > 0
    assert found.pays == (found.gain > 0)


def test_a_constant_schedule_equals_its_control(measured: Any) -> None:
    model, reference, dense, kept = measured
    for stage in range(3):
        found = validate(model, reference, dense, schedule=constant(stage, 3, end=END), kept=kept)
        assert found.schedule.kl == found.constant.kl == pytest.approx(found.reversed.kl)
        assert found.schedule.share == pytest.approx(kept[stage])
        assert found.gain == 0 and found.gain_error == 0 and not found.pays


def test_neighbours() -> None:
    kept = [0.9, 0.8, 0.8, 0.6]
    assert neighbours(kept, 0.7) == (2, 3, pytest.approx(0.5))
    assert neighbours(kept, 0.85) == (0, 1, pytest.approx(0.5))
    assert neighbours(kept, 0.9) == (0, 0, 1.0) and neighbours(kept, 0.6) == (3, 3, 1.0)
    assert neighbours(kept, 0.6 + 1e-15) == (3, 3, 1.0)
    above, below, weight = neighbours(kept, 0.8)
    assert kept[above] == kept[below] == 0.8 and weight == 1.0


def test_plan_chooses_on_one_half_and_validates_on_the_other(measured: Any) -> None:
    model, reference, dense, kept = measured
    planned = plan_schedule(model, reference, dense, kept=kept, horizon=HORIZON, block=BLOCK, end=END)
    # The answer of one token has no decode step: 0 and 2 choose, 1 and 3 validate.
    rows = planned.schedule.divergence
    again = [[0.0] * 5 for _ in range(3)]
    for s in range(3):
        kl = [token_divergence(model, reference[i], dense[i], lambda t, s=s: s if t else 0) for i in (0, 2)]
        for b in range(5):
            again[s][b] = float(torch.cat([k[8 * b : 8 * b + 8] for k in kl]).mean())
    assert [list(r) for r in rows] == [pytest.approx(r, rel=1e-5) for r in again]
    free = choose(rows, kept, lengths=[40, 26], horizon=HORIZON, block=BLOCK, end=END)
    first = free.stage_at(1) - 1 if free.stage_at(1) == free.stage_at(39) else None
    assert planned.chosen == choose(
        rows, kept, lengths=[40, 26], horizon=HORIZON, block=BLOCK, end=END, first=first
    )
    held_out = validate(
        model, [reference[i] for i in (1, 3)], [dense[i] for i in (1, 3)], schedule=planned.chosen, kept=kept
    )
    assert planned.validation == held_out
    if held_out.pays or abs(kept[1] - held_out.constant.share) > planning.SNAP:
        assert planned.schedule == planned.chosen
    else:
        assert planned.schedule.boundaries == (1, END) and planned.used == (0, 1)
        assert planned.schedule.divergence == planned.chosen.divergence and planned.schedule.block == BLOCK


@pytest.mark.parametrize("gain", [0.01, 0.0, -0.01])
def test_the_control_takes_over_where_the_schedule_does_not_pay(
    measured: Any, monkeypatch: pytest.MonkeyPatch, gain: float
) -> None:
    model, reference, dense, kept = measured

    def judged(*_: Any, **__: Any) -> Validation:
        at = Measured(0.5, kept[1])
        return Validation(replace(at, kl=0.5 - gain), at, at, gain, 0.001, 2, 50)

    monkeypatch.setattr(planning, "validate", judged)
    planned = plan_schedule(model, reference, dense, kept=kept, horizon=HORIZON, block=BLOCK, end=END)
    assert planned.chosen.boundaries[0] > 1  # falls: a constant stage has been kept out of the choice
    assert planned.schedule.boundaries == (planned.chosen.boundaries if gain > 0 else (1, END))


def test_without_a_stage_of_that_share_the_schedule_stays(
    measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stages and a budget between them: there is no constant stage to fall back to."""
    model, reference, dense, kept = measured

    def judged(*_: Any, **__: Any) -> Validation:
        at = Measured(0.5, (kept[0] + kept[1]) / 2)
        return Validation(replace(at, kl=0.6), at, at, -0.1, 0.001, 2, 50)

    monkeypatch.setattr(planning, "validate", judged)
    planned = plan_schedule(model, reference, dense, kept=kept[:2], horizon=HORIZON, block=BLOCK)
    assert planned.schedule == planned.chosen and planned.used == (0, 1)
    assert planned.validation is not None and not planned.validation.pays


def test_one_answer_is_both_halves(measured: Any) -> None:
    model, reference, dense, kept = measured
    planned = plan_schedule(model, reference[:1], dense[:1], kept=kept, horizon=HORIZON, block=BLOCK, end=END)
    assert planned.validation is not None
    assert (planned.validation.answers, planned.validation.tokens) == (1, 40)
    assert planned.validation.gain_error == 0


def test_nothing_to_measure(measured: Any) -> None:
    """No answer, or none with a decode step: the constant stage the budget allows."""
    model, reference, dense, kept = measured
    for some in (slice(0, 0), slice(4, 5)):
        planned = plan_schedule(model, reference[some], dense[some], kept=kept, end=END)
        assert planned.schedule == Schedule((1, END)) and planned.validation is None
    cheap = plan_schedule(model, [], [], kept=kept, mean_keep=0.5, end=END)
    assert cheap.schedule == Schedule((1, 1)) and cheap.used == (0, 2)
    assert plan_schedule(model, reference, dense, kept=kept[:1]).schedule == Schedule(())


def test_progress_counts_both_halves(measured: Any) -> None:
    model, reference, dense, kept = measured
    done: list[tuple[str, int, int]] = []
    plan_schedule(
        model, reference, dense, kept=kept, horizon=HORIZON, progress=lambda *step: done.append(step)
    )
    assert done == [("schedule", i, 4) for i in (1, 2, 3, 4)]


def test_compress_records_what_it_measured(compressed_stories: Any) -> None:
    """The checkpoint's schedule is the plan made from the checkpoint itself."""
    loaded, content = compressed_stories.source, compressed_stories.manifest
    kept = [content.plan.kept(s) for s in range(3)]
    reference = reference_answers(loaded.model, loaded.tokenizer, context=512)
    planned = plan_schedule(
        flrc_edge.load(compressed_stories.checkpoint),
        reference,
        dense_log_probs(loaded.model, reference),
        kept=kept,
        end=512,
    )
    assert content.schedule.boundaries == planned.schedule.boundaries
    assert content.schedule.horizon == 96 and content.schedule.block == planned.schedule.block == 8
    for row, wanted in zip(content.schedule.divergence, planned.schedule.divergence, strict=True):
        assert len(row) == 12 and row == pytest.approx(wanted, rel=1e-4)
    steps = [kept[content.schedule.stage_at(t)] for a in reference for t in range(1, a.length)]
    assert sum(steps) / len(steps) <= kept[1] + 0.01  # chosen for the lengths of the other half
