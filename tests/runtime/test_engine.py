"""Streaming: limits, stop strings, policies, and streams side by side."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from flrc_runtime import (
    Answer,
    ContextOverflowError,
    EmptyPromptError,
    FixedStage,
    NumericalError,
    Sampling,
    SchedulePolicy,
    ScriptedStages,
    StepState,
    UsageError,
    generate,
    load,
    manifest,
)
from flrc_runtime.engine import Model

PROMPT = "Once upon a time"


def test_a_stream_tells_everything_about_its_tokens(model: Model) -> None:
    tokens = list(model.stream(PROMPT, max_tokens=20))
    assert [t.index for t in tokens] == list(range(20))
    assert [t.position for t in tokens] == list(range(5, 25))
    assert [t.stage for t in tokens] == [0] * 8 + [1] * 12  # the bundle's schedule
    assert [t.finish_reason for t in tokens] == [None] * 19 + ["length"]
    assert {t.prompt_tokens for t in tokens} == {5}
    assert tokens[0].decode_tokens_per_second == 0 < tokens[-1].decode_tokens_per_second
    assert tokens[0].prompt_tokens_per_second > 0
    answer = Answer.of(tokens)
    # the decoder drops the space an answer begins with only when it begins the text
    assert answer.text == model.tokenizer.decode(answer.token_ids)


def test_end_token_stops(model: Model) -> None:
    whole = generate(model, PROMPT, max_tokens=20)
    end = whole.token_ids[9]
    info = replace(model.manifest.model, eos_token_ids=(2, end))
    ending = Model(
        replace(model.manifest, model=info), model.tokenizer, model.sessions, context=model.context
    )
    answer = generate(ending, PROMPT, max_tokens=20)
    first = whole.token_ids.index(end)
    assert answer.token_ids == whole.token_ids[: first + 1]
    assert answer.finish_reason == "stop"
    assert answer.text == model.tokenizer.decode(whole.token_ids[:first])


@pytest.mark.parametrize("length", [63, 64, 65])
def test_prompts_around_the_context(bundle, length: int) -> None:
    model = load(bundle.folder, context=64, threads=1)
    ids = ([1, 403, 407, 261, 378] * 13)[:length]
    if length >= 64:
        with pytest.raises(ContextOverflowError, match=f"{length} tokens .* context of 64") as caught:
            model.stream(ids)
        assert (caught.value.n_prompt, caught.value.n_context) == (length, 64)
    else:
        answer = generate(model, ids, max_tokens=10)
        assert (len(answer.token_ids), answer.finish_reason) == (1, "length")


def test_the_answer_ends_with_the_context(bundle) -> None:
    model = load(bundle.folder, context=32, threads=1)
    answer = generate(model, [1, 403, 407, 261], max_tokens=10_000)
    assert (len(answer.token_ids), answer.finish_reason) == (28, "length")


@pytest.mark.parametrize("context", [0, 1, -5, 513, True])
def test_impossible_contexts(bundle, context: int) -> None:
    with pytest.raises(UsageError, match="is not from 2 to the model's 512 tokens"):
        load(bundle.folder, context=context)


@pytest.mark.parametrize("max_tokens", [0, -1, True, 2.5])
def test_max_tokens_must_be_positive(model: Model, max_tokens) -> None:
    with pytest.raises(UsageError, match="max_tokens"):
        model.stream(PROMPT, max_tokens=max_tokens)


@pytest.mark.parametrize("prompt", ["", "  \n", []])
def test_empty_prompts(model: Model, prompt) -> None:
    with pytest.raises(EmptyPromptError):
        model.stream(prompt)


@pytest.mark.parametrize("prompt", [[1, 512], [-1]])
def test_token_ids_outside_the_vocabulary(model: Model, prompt: list[int]) -> None:
    with pytest.raises(UsageError, match="outside the vocabulary of 512"):
        model.stream(prompt)


def test_half_a_surrogate_pair(model: Model) -> None:
    with pytest.raises(UsageError, match="not valid Unicode at character 2"):
        model.stream("ab\ud83d")


def test_no_chat_template(model: Model) -> None:
    for arguments in ({"prompt": PROMPT, "chat": True}, {"prompt": [{"role": "user", "content": "a"}]}):
        with pytest.raises(UsageError, match="no chat template"):
            model.stream(**arguments)
    with pytest.raises(UsageError, match="system text needs the chat template"):
        model.stream(PROMPT, system="be brief")


def test_stop_strings_never_show(model: Model) -> None:
    whole = generate(model, PROMPT, max_tokens=60).text
    for stop in ("girl named Li", "the park", ", ", whole[20:31]):
        tokens = list(model.stream(PROMPT, max_tokens=60, stop=("never", stop)))
        assert "".join(t.text for t in tokens) == whole[: whole.index(stop)]
        assert tokens[-1].finish_reason == "stop"
    assert generate(model, PROMPT, max_tokens=60, stop=("never",)).text == whole
    # the end of the answer begins a stop string: held back, then given
    assert generate(model, PROMPT, max_tokens=60, stop=(whole[-4:] + "never",)).text == whole


@pytest.mark.parametrize("stop", [[""], ["a"] * 65, [1]])
def test_bad_stop_strings(model: Model, stop) -> None:
    with pytest.raises(UsageError, match="stop strings"):
        model.stream(PROMPT, stop=stop)


def test_a_policy_is_any_callable(model: Model) -> None:
    seen: list[StepState] = []

    def policy(state: StepState) -> int:
        seen.append(state)
        return 1 if state.generated >= 3 else 0

    answer = generate(model, PROMPT, max_tokens=6, policy=policy)
    assert answer.stage_of_token == (0, 0, 0, 1, 1, 1)
    assert [s.generated for s in seen] == [1, 2, 3, 4, 5]
    assert [s.position for s in seen] == [5, 6, 7, 8, 9]
    assert [s.stage for s in seen] == [0, 0, 0, 1, 1]
    assert seen[0].last_ms == 0 and all(s.last_ms > 0 for s in seen[1:])


def test_policies(model: Model) -> None:
    def stages(policy) -> tuple[int, ...]:
        return generate(model, PROMPT, max_tokens=4, policy=policy).stage_of_token

    assert stages(FixedStage(1)) == (1, 1, 1, 1)
    assert stages(FixedStage(1, prompt_stage=0)) == (0, 1, 1, 1)
    assert stages(ScriptedStages((1, 0, 1))) == (1, 0, 1, 1)
    assert stages(SchedulePolicy(manifest.Schedule((2,)))) == (0, 0, 1, 1)
    with pytest.raises(UsageError, match="at least one stage"):
        ScriptedStages(())


@pytest.mark.parametrize("stage", [2, -1, 1.0, True, None])
def test_a_stage_that_is_not_there(model: Model, stage) -> None:
    with pytest.raises(UsageError, match="not one of the bundle's stages 0 to 1"):
        list(model.stream(PROMPT, policy=lambda state: stage))
    if stage is not None:
        with pytest.raises(UsageError, match="not one of the bundle's stages 0 to 1"):
            model.stream(PROMPT, policy=FixedStage(stage))
    with pytest.raises(UsageError):
        model.logits([1, 2], stages=[0, stage])


def test_interleaved_streams_equal_solo_runs(model: Model) -> None:
    prompts = (PROMPT, "The dog")
    solo = [[t.token_id for t in model.stream(p, max_tokens=30)] for p in prompts]
    streams = [model.stream(p, max_tokens=30) for p in prompts]
    both = zip(*streams, strict=True)
    assert [list(ids) for ids in zip(*[(a.token_id, b.token_id) for a, b in both], strict=True)] == solo


def test_threads_equal_serial(model: Model) -> None:
    def run(seed: int) -> str:
        return generate(model, PROMPT, max_tokens=30, sampling=Sampling(temperature=1, seed=seed)).text

    serial = [run(seed) for seed in range(8)]
    assert len(set(serial)) == 8
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(8))) == serial


def test_stages_open_when_they_are_needed(bundle, model: Model) -> None:
    late = load(bundle.folder, stages=(1,), threads=1)
    assert list(late.sessions._open) == ["stage_1.onnx"]
    assert generate(late, PROMPT, max_tokens=9).token_ids == generate(model, PROMPT, max_tokens=9).token_ids
    assert list(late.sessions._open) == ["stage_1.onnx", "stage_0.onnx"]


def test_logits_that_are_not_finite(copied) -> None:
    """What only stage 0 reads becomes NaN (0xFF), which onnxruntime loads without a word."""
    onnx = pytest.importorskip("onnx")

    def blocks(name: str) -> set[tuple[int, int]]:
        graph = onnx.load(copied / name, load_external_data=False).graph
        entries = [{e.key: e.value for e in t.external_data} for t in graph.initializer if t.external_data]
        return {(int(e["offset"]), int(e["length"])) for e in entries}

    sealed = manifest.read(copied)
    weights = bytearray((copied / "weights.bin").read_bytes())
    own = blocks("stage_0.onnx") - blocks("stage_1.onnx")
    for offset, length in own:
        weights[offset : offset + length] = b"\xff" * length
    (copied / "weights.bin").write_bytes(weights)
    manifest.seal(copied, sealed)
    damaged = load(copied, threads=1)
    tokens = damaged.stream(PROMPT, max_tokens=20)
    with pytest.raises(NumericalError, match="stage 0 met a number that is not finite at position 4"):
        next(tokens)
    assert own and len(generate(damaged, PROMPT, policy=FixedStage(1), max_tokens=5).token_ids) == 5


def test_teacher_forcing_checks_its_arguments(model: Model) -> None:
    with pytest.raises(EmptyPromptError):
        model.logits([])
    with pytest.raises(ContextOverflowError):
        model.logits([1] * 513)
    with pytest.raises(UsageError, match="1 stages do not fit 2 tokens"):
        model.logits([1, 2], stages=[0])
    with pytest.raises(UsageError, match="chunk 0"):
        model.logits([1, 2], chunk=0)
    assert model.logits([1] * 512).shape == (512, 512)
