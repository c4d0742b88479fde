"""Summaries under policies, and a whole evaluation: a checkpoint and its bundle give the same figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flrc_edge.errors import UsageError
from flrc_edge.evaluation.bootstrap import Bootstrap
from flrc_edge.evaluation.evaluate import Settings, evaluate
from flrc_edge.evaluation.policies import StagePolicy, parse_policy
from flrc_edge.evaluation.policy_runs import answer_densely, planned_lengths, read_prompts, run_policies
from flrc_edge.evaluation.subject import Subject, check_dense, open_subject
from flrc_edge.evaluation.summarization import score_summaries, summary_result

NAMES = ("Lily", "Tom", "Ben", "Sue", "Max", "Anna", "Sam", "Mia")


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "dialogues.jsonl"
    rows = [
        {
            "fname": f"s{i}",
            "dialogue": f"#Person1#: Hi {a}!\n#Person2#: Hi {b}.",
            "summary": f"{b} greets {a}.",
        }
        for i, (a, b) in enumerate(zip(NAMES, NAMES[3:] + NAMES[:3], strict=True))
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def checkpoint(compressed_stories: Any) -> Subject:
    return open_subject(str(compressed_stories.checkpoint))


@pytest.fixture(scope="module")
def dense(stories: Path) -> Subject:
    return open_subject(str(stories))


@pytest.fixture(scope="module")
def settings(dialogues: Path) -> Settings:
    return Settings(
        texts=("austen-heldout",), windows=3, window=64, stride=48, summaries=(str(dialogues),), samples=3,
        max_tokens=12, split="all", resamples=200,
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(checkpoint: Subject, dense: Subject, settings: Settings) -> dict[str, Any]:
    return evaluate(checkpoint, settings, dense=dense).as_dict()


def differing(a: Any, b: Any, where: str = "") -> list[str]:
    """Places where two results differ by more than 1e-3."""
    if isinstance(a, dict):
        return [d for key in a.keys() | b.keys() for d in differing(a.get(key), b.get(key), f"{where}/{key}")]
    if isinstance(a, list):
        pairs = zip(a, b, strict=True)
        return [d for i, pair in enumerate(pairs) for d in differing(*pair, f"{where}/{i}")]
    same = a == pytest.approx(b, rel=1e-3, abs=1e-3) if isinstance(a, float) else a == b
    return [] if same else [f"{where}: {a} {b}"]


def test_a_checkpoint_and_its_bundle_give_the_same_figures(
    result: dict[str, Any], settings: Settings, stories_bundle: Path, dense: Subject
) -> None:
    bundle = evaluate(open_subject(str(stories_bundle)), settings, dense=dense).as_dict()
    found = differing(result, bundle)
    assert sorted(d.split(":")[0] for d in found) == ["/dtype", "/kind", "/machine"]
    assert bundle["kind"] == "bundle" and "onnxruntime" in bundle["machine"]


def test_every_figure_has_an_interval(result: dict[str, Any]) -> None:
    estimates = [e for f in result["texts"][0]["figures"] for e in f["estimates"].values()]
    estimates += [e for p in result["summaries"][0]["policies"] for e in p["estimates"].values()]
    estimates += [d["estimate"] for d in result["summaries"][0]["differences"]]
    assert len(estimates) > 80
    assert all(e["low"] <= e["value"] + 1e-9 and e["value"] <= e["high"] + 1e-9 for e in estimates)
    assert sum(e["low"] < e["high"] for e in estimates) > 40


def test_default_policies_and_what_they_activate(result: dict[str, Any], checkpoint: Subject) -> None:
    summary, kept = result["summaries"][0], checkpoint.facts.kept
    policies = {p["policy"]: {k: e["value"] for k, e in p["estimates"].items()} for p in summary["policies"]}
    assert list(policies)[:4] == ["dense", "static:0", "static:1", "static:2"]
    assert list(policies)[-2:] == ["schedule", "reversed"] and summary["control"] in policies
    for stage in range(3):
        figures = policies[f"static:{stage}"]
        for key in ("prompt_keep", "answer_keep", "forced_keep"):
            assert figures[key] == pytest.approx(kept[stage], rel=1e-5)
    assert policies["schedule"]["prompt_keep"] == pytest.approx(kept[0], rel=1e-5)
    assert policies["reversed"]["forced_keep"] == pytest.approx(policies["schedule"]["forced_keep"], rel=1e-5)
    assert policies["dense"]["answer_keep"] == 1 and policies["dense"]["rougeL_dense"] == 1
    assert "kl" not in policies["dense"] and 0 < policies["static:0"]["kl"] < policies["static:2"]["kl"]
    assert {d["policy"] for d in summary["differences"]} == set(policies) - {"dense", summary["control"]}


def test_shares_of_a_prompt_on_stage_0_by_hand(checkpoint: Subject, dialogues: Path) -> None:
    prompts = read_prompts(checkpoint, dialogues, split="all", count=2, max_tokens=5)
    scores = score_summaries(checkpoint, prompts, policies=("static:2:prompt0",))
    figures = {k: e.value for k, e in summary_result(scores, resamples=100).policies[0].estimates.items()}
    kept = checkpoint.facts.kept
    assert figures["tokens"] == 5 and figures["prompt_keep"] == pytest.approx(kept[0])
    assert figures["answer_keep"] == pytest.approx((kept[0] + 4 * kept[2]) / 5)
    assert "kl" not in figures and "rougeL_dense" not in figures


def test_a_model_is_its_own_dense_model(dense: Subject, dialogues: Path) -> None:
    prompts = read_prompts(dense, dialogues, split="all", count=2, max_tokens=8)
    scores = score_summaries(dense, prompts, dense=dense)
    (_, own) = summary_result(scores, resamples=100).policies
    assert own.policy == "static:0"
    assert own.estimates["kl"].value == 0 and own.estimates["top1"].value == 1
    assert own.estimates["rougeL_dense"].value == 1


def test_policies_that_agree_share_what_was_computed_and_others_do_not(
    checkpoint: Subject, dense: Subject, dialogues: Path
) -> None:
    asked = read_prompts(checkpoint, dialogues, split="all", count=2, max_tokens=10).prompts
    prompts, _ = answer_densely(checkpoint, asked, dense, max_tokens=10)
    late, early = StagePolicy("late", (50,), (0, 2)), StagePolicy("early", (3,), (0, 2))
    policies = (parse_policy("static:0", checkpoint.facts.schedule), late, early)
    together = run_policies(checkpoint, prompts, policies, dense=dense, max_tokens=10)
    assert together["late"].text == together["static:0"].text
    assert together["late"].forced == together["static:0"].forced
    assert together["late"].share == together["static:0"].share
    assert together["late"].share == pytest.approx([checkpoint.facts.kept[0]] * 2, rel=1e-15)
    alone = run_policies(checkpoint, prompts, (early,), dense=dense, max_tokens=10)["early"]
    assert alone.text == together["early"].text and alone.share == together["early"].share
    kl = [np.concatenate([s.kl for s in t.forced]) for t in (alone, together["early"], together["late"])]
    assert kl[0] == pytest.approx(kl[1], rel=1e-4) and kl[0][:3] == pytest.approx(kl[2][:3], rel=1e-4)
    assert kl[0] != pytest.approx(kl[2], abs=1e-3)


def test_scores_of_two_subjects_on_the_same_prompts_can_be_compared(
    checkpoint: Subject, dense: Subject, dialogues: Path
) -> None:
    prompts = read_prompts(checkpoint, dialogues, split="all", count=3, max_tokens=8)
    ours, theirs = (
        score_summaries(s, prompts, dense=dense, policies=("static:0",)).statistics["static:0"]
        for s in (checkpoint, dense)
    )
    found = Bootstrap(3, resamples=100).difference(ours["kl"], theirs["kl"])
    assert found.value == pytest.approx(ours["kl"](np.ones(3))) and found.low is not None and found.low > 0


def test_planned_lengths(checkpoint: Subject, dialogues: Path) -> None:
    prompts = read_prompts(checkpoint, dialogues, split="all", count=2, max_tokens=400).prompts
    horizon = checkpoint.facts.schedule.horizon
    assert horizon > 0 and planned_lengths(checkpoint, prompts, max_tokens=400) == [min(horizon, 400)] * 2
    assert planned_lengths(checkpoint, prompts, max_tokens=3) == [3, 3]


def test_prompts_that_are_too_long_are_passed_over(checkpoint: Subject, tmp_path: Path) -> None:
    rows = [
        {"fname": str(i), "dialogue": "Hello. " * n, "summary": "Hello."}
        for i, n in enumerate((2, 400, 3, 4))
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_prompts(checkpoint, path, split="all", count=2, max_tokens=8)
    assert [p.sample.id for p in found.prompts] == ["0", "2"] and found.too_long == 1
    short = read_prompts(
        checkpoint, path, split="all", count=2, max_tokens=8, context=len(found.prompts[0].ids) + 8
    )
    assert [p.sample.id for p in short.prompts] == ["0"] and short.too_long == 3
    with pytest.raises(
        UsageError, match=r"no prompt of .* leaves room for 510 answer tokens in a context of 512"
    ):
        read_prompts(checkpoint, path, split="all", count=2, max_tokens=510)


def test_only_the_stages_that_are_named(checkpoint: Subject) -> None:
    settings = Settings(
        texts=("austen-heldout",), windows=1, window=16, policies=("static:2", "static:1:prompt0")
    )
    (text,) = evaluate(checkpoint, settings).texts
    assert [f.stage for f in text.figures] == ["static:1", "static:2"]
    assert text.figures[0].estimates["perplexity"].low is None and "kl" not in text.figures[0].estimates


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": ()}, "there is nothing to measure"),
        ({"window": 1}, "at least 2 tokens, not 1"),
        ({"stride": 0}, "stride must lie between 1 and the window of 1024, not 0"),
        ({"stride": 1025}, "stride must lie between 1 and the window of 1024, not 1025"),
        ({"resamples": 5}, "at least 100 resamples"),
    ],
)
def test_impossible_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Settings(**change)


def test_a_dense_model_of_another_kind_is_refused(
    checkpoint: Subject, compressed_stories: Any, family_model: Any, stories_bundle: Path
) -> None:
    for other, message in {
        "qwen2": "has architecture llama and the dense model qwen2: they are of different models",
        "llama": "has layers: 5 and the dense model 3: they are of different models",
    }.items():
        with pytest.raises(UsageError, match=message):
            check_dense(checkpoint, open_subject(str(family_model(other))))
    with pytest.raises(UsageError, match=r"the bundle given as dense is compressed to keep 0\.[67]"):
        check_dense(checkpoint, open_subject(str(stories_bundle)))


def test_vocabularies_are_compared(checkpoint: Subject, dense: Subject) -> None:
    from dataclasses import replace

    class Other:
        facts = replace(dense.facts)
        tokenizer = type("T", (), {"get_vocab": staticmethod(lambda: {"a": 1})})()

    with pytest.raises(UsageError, match="have different vocabularies"):
        check_dense(checkpoint, Other())  # type: ignore[arg-type]
    Other.facts = replace(dense.facts, vocab_size=600)
    with pytest.raises(UsageError, match="has a vocabulary of 512 and the dense model 600"):
        check_dense(checkpoint, Other())  # type: ignore[arg-type]
    Other.facts = replace(dense.facts, hidden_size=32)
    with pytest.raises(UsageError, match="has hidden size 64 and the dense model 32"):
        check_dense(checkpoint, Other())  # type: ignore[arg-type]
