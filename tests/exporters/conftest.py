"""Checkpoints in the documented folder format, made here: the exporter is tested without the compressor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from flrc_edge.chunks import Chunk, chunks_of
from flrc_exporters.architectures import DecoderConfig
from flrc_runtime import manifest as manifests
from flrc_runtime.kernels import register
from flrc_runtime.manifest import Manifest, ModelInfo, ProjectionPlan, RankPlan, Schedule, Storage

STORIES = Path(__file__).parents[1] / "data" / "stories260k"
Ranks = Callable[[str, tuple[int, int]], tuple[int | None, ...]]


@dataclass
class Checkpoint:
    """A checkpoint folder beside the dense model, nested factors (U, V) and stored chunks it came from."""

    folder: Path
    model: PreTrainedModel
    plan: RankPlan
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    chunks: dict[str, tuple[Chunk, ...]]

    def stage_logits(self, ids: torch.Tensor, stage: int) -> np.ndarray:
        """Logits [tokens, vocab] of the torch model whose Linear weights are U_r V_r of a stage."""
        dense = {}
        for plan in self.plan.projections:
            rank = plan.ranks[stage]
            if rank is not None:
                linear = self.model.get_submodule(plan.name)
                dense[plan.name] = linear.weight.data
                u, v = self.factors[plan.name]
                linear.weight.data = (u[:, :rank].double() @ v[:rank].double()).float()
        try:
            with torch.no_grad():
                return self.model(input_ids=ids[None]).logits[0].float().numpy()
        finally:
            for name, weight in dense.items():
                self.model.get_submodule(name).weight.data = weight


def write_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    ranks: Ranks,
    *,
    stages: int = 1,
    storage: Storage = "plain",
    dtype: torch.dtype = torch.float32,
    tokenizer: Path = STORIES,
) -> Checkpoint:
    """Factor a model by plain SVD and write it as ``compress`` would."""
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw.setdefault("architectures", [type(model).__name__])
    (folder / "config.json").write_text(json.dumps(raw))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    config = DecoderConfig.from_hf(raw)
    state = {k: v.detach().to(dtype).contiguous() for k, v in model.state_dict().items()}
    if config.tied_embedding:
        state.pop("lm_head.weight", None)
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    chunks: dict[str, tuple[Chunk, ...]] = {}
    plans = []
    for p in config.projections():
        r = ranks(p.name, p.shape)
        plan = ProjectionPlan(p.name, p.shape, r, storage="plain" if r[0] is None else storage)
        plans.append(plan)
        if r[0] is not None:
            u, s, v = torch.linalg.svd(state.pop(f"{p.name}.weight").double(), full_matrices=False)
            u, v = u[:, : r[0]] * s[: r[0]].sqrt(), v[: r[0]] * s[: r[0], None].sqrt()
            factors[p.name] = u.float(), v.float()
            chunks[p.name] = chunks_of(*factors[p.name], plan)
    stored = {
        f"{name}.chunks.{i}.{field}": tensor
        for name, blocks in chunks.items()
        for i, chunk in enumerate(blocks)
        for field, tensor in (("V", chunk.V), ("U", chunk.U), ("order", chunk.order))
        if tensor is not None
    }
    save_file(stored, folder / "factors.safetensors")
    save_file(state, folder / "base.safetensors")
    keep = tuple(1.0 if stages == 1 else round(0.9 - 0.1 * s, 2) for s in range(stages))
    rank_plan = RankPlan("uniform", keep, tuple(plans))
    info = ModelInfo(
        "test",
        config.architecture,
        config.vocab_size,
        config.hidden_size,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.context_length,
        config.eos_token_ids,
        config.parameters(),
    )
    schedule = Schedule(tuple(16 * (s + 1) for s in range(stages - 1)))
    manifests.seal(folder, Manifest("checkpoint", info, rank_plan, schedule, "float32", "one-sided"))
    return Checkpoint(folder, model.float().eval(), rank_plan, factors, chunks)


def dense_everywhere(name: str, shape: tuple[int, int]) -> tuple[None]:
    return (None,)


def three_stages(name: str, shape: tuple[int, int]) -> tuple[int | None, ...]:
    """Some dense, some that change once, at either boundary, some twice, some never; no multiples of 32."""
    layer, kind = int(name.split(".")[2]), name.rpartition(".")[2]
    full = min(shape)
    if kind == "v_proj" or (layer == 1 and kind in ("q_proj", "k_proj", "gate_proj")):
        return (None, None, None)
    if kind == "q_proj":
        return (full - 3, full - 3, full - 9)
    if kind == "k_proj":
        return (full - 2, full // 2, full // 2)
    if kind == "down_proj":
        return (full - 4, full - 4, full - 20)
    if kind == "gate_proj":
        return (full - 5, full - 16, full - 27)
    return (full - 6, full - 6, full - 6)


@pytest.fixture(scope="session")
def stories_model() -> PreTrainedModel:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def story_ids() -> torch.Tensor:
    """128 tokens of the model's own document: real text."""
    from tokenizers import Tokenizer

    text = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
        " One day, she saw a big, red ball. She wanted to play with it, but it was too high. Lily's "
        'mom said, "Lily, let\'s go to the park." Lily was sad and did not know what to do. She said, '
        '"I will be your friend, and I will help you find your ball." They looked under the tree and '
        "behind the house, and then the dog found it in the grass. Lily was so happy that she gave "
        "the dog a big hug and they played with the ball until it was dark."
    )
    ids = Tokenizer.from_file(str(STORIES / "tokenizer.json")).encode(text).ids
    assert len(ids) >= 128
    return torch.tensor(ids[:128])


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory: pytest.TempPathFactory, stories_model: PreTrainedModel) -> Checkpoint:
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "ckpt", stories_model, dense_everywhere)


@pytest.fixture(scope="session")
def staged_checkpoint(tmp_path_factory: pytest.TempPathFactory, stories_model: PreTrainedModel) -> Checkpoint:
    return write_checkpoint(tmp_path_factory.mktemp("staged") / "ckpt", stories_model, three_stages, stages=3)


@pytest.fixture(scope="session")
def pivoted_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, stories_model: PreTrainedModel
) -> Checkpoint:
    folder = tmp_path_factory.mktemp("pivoted") / "ckpt"
    return write_checkpoint(folder, stories_model, three_stages, stages=3, storage="pivoted")


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Checkpoint]:
    return write_checkpoint


class Stage:
    """A stage graph in onnxruntime, driven as the runtime does: one set of KV buffers, bound in place."""

    def __init__(self, graph: Path, *, context: int = 256, threads: int = 1) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        register(options)
        self.session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        caches = [i for i in self.session.get_inputs() if i.name.startswith("past")]
        own = caches[0].type == "tensor(uint8)"  # rows of 16 positions
        shape = [1, caches[0].shape[1], context // 16 if own else context, caches[0].shape[3]]
        zeros = np.zeros(shape, np.uint8 if own else np.float32)
        self.kv = {i.name: ort.OrtValue.ortvalue_from_numpy(zeros.copy()) for i in caches}
        self.length = 0

    def run(self, ids: Any) -> np.ndarray:
        """Append tokens; return their logits [tokens, vocab]."""
        ids = np.asarray(ids, np.int64).reshape(1, -1)
        self.length += ids.shape[1]
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((1, self.length), np.int64))
        if any(i.name == "logits_start" for i in self.session.get_inputs()):
            binding.bind_cpu_input("logits_start", np.zeros(1, np.int64))
        binding.bind_output("logits")
        for name, value in self.kv.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        self.session.run_with_iobinding(binding)
        logits: np.ndarray = binding.copy_outputs_to_cpu()[0][0]
        return logits

    def forced(self, ids: Any, prompt: int) -> np.ndarray:
        """Teacher-force: ``prompt`` tokens in one go, the rest one by one."""
        ids = np.asarray(ids)
        parts = [self.run(ids[:prompt])] + [self.run(ids[i : i + 1]) for i in range(prompt, len(ids))]
        return np.concatenate(parts)

    def greedy(self, ids: Any, tokens: int) -> list[int]:
        """Continue greedily."""
        out = [int(self.run(ids)[-1].argmax())]
        while len(out) < tokens:
            out.append(int(self.run(out[-1:])[-1].argmax()))
        return out


@pytest.fixture(scope="session")
def open_stage() -> type[Stage]:
    return Stage


@pytest.fixture(scope="session")
def bundles(
    tmp_path_factory: pytest.TempPathFactory,
    dense_checkpoint: Checkpoint,
    staged_checkpoint: Checkpoint,
    pivoted_checkpoint: Checkpoint,
) -> Iterator[Callable[..., Path]]:
    """Bundles of the stories checkpoints, by ("dense" | "staged" | "pivoted", dtype), perhaps stock; exported once."""
    from flrc_exporters.bundle import export

    done: dict[tuple[str, str, bool], Path] = {}
    sources = {"dense": dense_checkpoint, "staged": staged_checkpoint, "pivoted": pivoted_checkpoint}

    def bundle(source: str, dtype: Any, stock: bool = False) -> Path:
        key = (source, dtype, stock)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("bundle") / f"{source}-{dtype}"
            export(sources[source].folder, done[key], dtype=dtype, stock=stock)
        return done[key]

    yield bundle
