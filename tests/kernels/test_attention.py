"""The operator flrc.Attention in onnxruntime: a reference in float64, the same bytes everywhere, and refusals."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

TYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8}


@dataclass(frozen=True)
class Setting:
    """A node's attributes, and what of it is optional."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    window: int = 0
    softcap: float = 0.0
    rotated: int | None = None  # width of cos; None: none
    norms: bool = False
    cache: str = "float32"

    @property
    def block_bytes(self) -> int:
        return 16 * self.dim * np.dtype(TYPES[self.cache]).itemsize + 64 * (self.cache == "int8")

    def attributes(self) -> dict[str, Any]:
        return {
            "num_heads": self.heads, "kv_num_heads": self.kv_heads, "head_dim": self.dim, "scale": self.dim**-0.5,
            "window": self.window, "softcap": self.softcap, "epsilon": 1e-6, "cache": self.cache,
        }  # fmt: skip

    def blocks(self, count: int) -> Any:
        return np.zeros((1, self.kv_heads, count, self.block_bytes), np.uint8)


FLOATS = ["q", "k", "v", "cos", "sin", "q_norm", "k_norm"]


def session(
    kernels: Any, setting: Setting, *, threads: int = 1, change: dict[str, Any] | None = None, left: str = ""
) -> Any:
    """Open a graph of one Attention, its attributes changed (None: taken away), an input left out."""
    names = ["q", "k", "v", "past_key", "past_value", "mask", "cos", "sin", "q_norm", "k_norm"]
    if setting.rotated is None:
        names[6:8] = ["", ""]
    if not setting.norms:
        del names[8:]
    given = ["" if name == left else name for name in names]
    attributes = setting.attributes() | (change or {})
    node = helper.make_node(
        "Attention", given, ["y", "present_key", "present_value"], domain="flrc",
        **{key: value for key, value in attributes.items() if value is not None},
    )  # fmt: skip
    kinds = {name: TensorProto.FLOAT for name in FLOATS} | {"mask": TensorProto.INT64}
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.UINT8), None) for n in given if n],
        [
            helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT if n == "y" else TensorProto.UINT8), None)
            for n in ("y", "present_key", "present_value")
        ],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("flrc", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(kernels.library._name)
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def inputs(setting: Setting, tokens: int, seed: int = 0) -> dict[str, Any]:
    """Return what all tokens of a text need."""
    rng = np.random.default_rng(seed)
    sizes = {"q": setting.heads, "k": setting.kv_heads, "v": setting.kv_heads}
    values = {
        n: rng.standard_normal((1, tokens, h * setting.dim)).astype(np.float32) for n, h in sizes.items()
    }
    if setting.rotated is not None:
        angles = np.outer(np.arange(tokens + 3), 10000.0 ** -(np.arange(setting.rotated) / setting.rotated))
        values |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    if setting.norms:
        values |= {n: rng.uniform(0.5, 2, setting.dim).astype(np.float32) for n in ("q_norm", "k_norm")}
    return values  # fmt: skip


def fed(values: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    """Return the inputs of tokens first .. last - 1, without the past."""
    own = {n: v[:, first:last] if n in ("q", "k", "v") else v for n, v in values.items()}
    return own | {"mask": np.ones((1, last), np.int64)}


def run(opened: Any, setting: Setting, values: dict[str, Any], cuts: list[int]) -> tuple[Any, Any, Any]:
    """Return y of all tokens, read in pieces into caches that grow, and the last caches."""
    key, value, ys = setting.blocks(0), setting.blocks(0), []
    for first, last in zip([0, *cuts[:-1]], cuts, strict=True):
        feed = fed(values, first, last) | {"past_key": key, "past_value": value}
        y, key, value = opened.run(None, feed)
        ys.append(y)
    return np.concatenate(ys, axis=1), key, value


def run_shared(
    opened: Any, setting: Setting, values: dict[str, Any], cuts: list[int]
) -> tuple[Any, Any, Any]:
    """Do the same in caches that stay where they are; the positions that are not there yet hold anything."""
    blocks = -(-cuts[-1] // 16) + 2
    caches = [onnxruntime.OrtValue.ortvalue_from_numpy(setting.blocks(blocks) + 255) for _ in range(2)]
    ys = []
    for first, last in zip([0, *cuts[:-1]], cuts, strict=True):
        binding = opened.io_binding()
        for name, array in fed(values, first, last).items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, cache in zip(("key", "value"), caches, strict=True):
            binding.bind_ortvalue_input(f"past_{name}", cache)
            binding.bind_ortvalue_output(f"present_{name}", cache)
        binding.bind_output("y")
        opened.run_with_iobinding(binding)
        ys.append(binding.copy_outputs_to_cpu()[-1])  # in the order of binding
    return np.concatenate(ys, axis=1), *(cache.numpy()[:, :, : -(-cuts[-1] // 16)].copy() for cache in caches)


def kept(setting: Setting, x: Any) -> Any:
    """Return what a cache keeps of ``[tokens, heads, dim]``."""
    if setting.cache != "int8":
        return x.astype(TYPES[setting.cache]).astype(np.float64)
    most = np.abs(x).max(-1, keepdims=True)
    return np.rint(x * 127 / most) * most / 127


def reference(setting: Setting, values: dict[str, Any]) -> Any:
    """Return y in float64."""
    tokens = values["q"].shape[1]
    split = {n: values[n][0].astype(np.float64).reshape(tokens, -1, setting.dim) for n in ("q", "k", "v")}
    for name in ("q", "k"):
        x = split[name]
        if setting.norms:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * values[f"{name}_norm"]
        if setting.rotated is not None:
            w = setting.rotated
            cos, sin = (values[n].astype(np.float64)[:tokens, None] for n in ("cos", "sin"))
            a, b = x[..., :w], x[..., w : 2 * w]
            x = np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * w :]], axis=-1)
        split[name] = x
    group = setting.heads // setting.kv_heads
    key, value = (np.repeat(kept(setting, split[n]), group, axis=1) for n in ("k", "v"))
    scores = np.einsum("thd,phd->htp", split["q"], key) * setting.dim**-0.5
    if setting.softcap:
        scores = setting.softcap * np.tanh(scores / setting.softcap)
    t, p = np.ogrid[:tokens, :tokens]
    seen = (p <= t) & ((p > t - setting.window) if setting.window else True)
    weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("htp,phd->thd", weights, value).reshape(1, tokens, -1)


SETTINGS = {
    "plain": Setting(heads=2, kv_heads=2),
    "grouped": Setting(heads=9, kv_heads=3, dim=64, rotated=32),
    "many": Setting(heads=35, kv_heads=1, dim=16, rotated=8),  # more heads of a group than a tile takes
    "wide": Setting(heads=6, kv_heads=1, dim=256, rotated=32),
    "widest": Setting(heads=9, kv_heads=1, dim=512),
    "window": Setting(heads=4, kv_heads=2, dim=32, window=37, rotated=8),
    "narrow": Setting(heads=4, kv_heads=4, dim=32, window=1),
    "softcap": Setting(heads=8, kv_heads=2, dim=32, softcap=3.0, rotated=16),
    "norms": Setting(heads=4, kv_heads=1, dim=128, norms=True, rotated=64),
    "odd_8": Setting(heads=3, kv_heads=1, dim=8, rotated=3),
    "odd_24": Setting(heads=4, kv_heads=2, dim=24, norms=True),
    "odd_40": Setting(heads=5, kv_heads=1, dim=40, window=130, rotated=20),
    "odd_72": Setting(heads=6, kv_heads=2, dim=72, softcap=50.0, norms=True, rotated=36),
}
QUICK = ("grouped", "window", "odd_24", "odd_72")  # the others only with all tests
CACHES = pytest.mark.parametrize("cache", list(TYPES))


@CACHES
@pytest.mark.parametrize("name", list(SETTINGS))
def test_reference(kernels: Any, name: str, cache: str) -> None:
    setting = replace(SETTINGS[name], cache=cache)
    values = inputs(setting, 300)
    wanted = reference(setting, values)
    y, key, value = run(session(kernels, setting), setting, values, [300])
    assert y.shape == wanted.shape and key.shape == value.shape == (
        1,
        setting.kv_heads,
        19,
        setting.block_bytes,
    )
    # Rounding of a key or value to the cache's type may fall the other way for a last bit that differs.
    limit = {"float32": 2e-6, "float16": 2e-4, "int8": 4e-3}[cache]
    assert np.abs(y - wanted).max() < limit * np.abs(wanted).max()


def digests(results: tuple[Any, Any, Any], tokens: int) -> list[bytes]:
    y, key, value = results
    return [y.tobytes(), *(cache[:, :, : tokens // 16].tobytes() for cache in (key, value))]


@CACHES
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in SETTINGS]
)
def test_instruction_sets_threads_and_cuts_give_the_same_bytes(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, name: str, cache: str
) -> None:
    setting, tokens = replace(SETTINGS[name], cache=cache), 290
    values = inputs(setting, tokens)
    wanted = digests(run(session(kernels, setting), setting, values, [tokens]), tokens)
    cuts = [[1, 3, 128, 130, 257, tokens], [200, *range(201, 210), tokens]]
    for isa in kernels.isas:
        monkeypatch.setenv("FLRC_EDGE_ISA", isa)
        opened = session(kernels, setting, threads=1 + len(isa) % 4)
        for cut in ([tokens], *cuts):
            assert digests(run(opened, setting, values, cut), tokens) == wanted, (isa, cut)
    monkeypatch.delenv("FLRC_EDGE_ISA")
    for threads in (1, 2, 3, 4):
        opened = session(kernels, setting, threads=threads)
        for cut in ([tokens], cuts[threads % 2]):
            assert digests(run_shared(opened, setting, values, cut), tokens) == wanted, (threads, cut)


@CACHES
def test_token_by_token_gives_the_same_bytes(kernels: Any, cache: str) -> None:
    setting = Setting(heads=9, kv_heads=3, dim=64, rotated=32, cache=cache)
    tokens = 150
    values = inputs(setting, tokens)
    opened = session(kernels, setting, threads=2)
    wanted = digests(run(opened, setting, values, [tokens]), tokens)
    each = list(range(1, tokens + 1))
    assert digests(run(opened, setting, values, each), tokens) == wanted
    assert digests(run_shared(opened, setting, values, each), tokens) == wanted


@pytest.mark.parametrize("name", ["grouped", "window", "odd_72"])
def test_arm64_gives_the_same_bytes(arm64_program: Any, kernels: Any, name: str) -> None:
    """NEON under qemu, the portable code of either processor."""
    command, tokens = arm64_program("attention"), 150
    for kind, cache in enumerate(TYPES):
        setting = replace(SETTINGS[name], cache=cache, norms=True, rotated=SETTINGS[name].dim // 2)
        blocks, values = -(-tokens // 16), inputs(setting, tokens)
        head = [
            setting.heads, setting.kv_heads, setting.dim, kind, setting.window, setting.rotated, tokens,
            setting.block_bytes, blocks,
        ]  # fmt: skip
        numbers = np.array([setting.dim**-0.5, setting.softcap, 1e-6], np.float32)
        given = [values[n] for n in ("q", "k", "v")]
        given += [values[n][:tokens] for n in ("cos", "sin")] + [values[n] for n in ("q_norm", "k_norm")]
        data = np.array(head, np.int32).tobytes() + numbers.tobytes() + b"".join(g.tobytes() for g in given)
        found = subprocess.run(command, input=data, capture_output=True, check=True).stdout
        y, key, value = run(session(kernels, setting), setting, values, [tokens])
        half = len(found) // 2
        assert found[:half] == found[half:]
        kept_bytes = tokens // 16 * setting.block_bytes  # of a head, whole blocks
        caches = np.frombuffer(found[y.nbytes : half], np.uint8).reshape(2, setting.kv_heads, -1)
        assert found[: y.nbytes] == y.tobytes()
        for ours, theirs in zip((key, value), caches, strict=True):
            whole = ours.reshape(setting.kv_heads, -1)[:, :kept_bytes]
            assert np.array_equal(whole, theirs[:, :kept_bytes])


@pytest.mark.full
def test_long_texts(kernels: Any) -> None:
    """More chunks than are kept at a time."""
    setting = Setting(heads=3, kv_heads=1, dim=8)
    tokens = 128 * 70
    values = inputs(setting, tokens)
    ys = [
        run(session(kernels, setting, threads=threads), setting, values, [tokens - 5, tokens - 1, tokens])[0]
        for threads in (1, 3)
    ]
    whole = run(session(kernels, setting), setting, values, [tokens])[0]
    assert ys[0].tobytes() == ys[1].tobytes() == whole.tobytes()


def test_no_tokens(kernels: Any) -> None:
    setting = Setting()
    values = inputs(setting, 20)
    opened = session(kernels, setting)
    _, key, value = run(opened, setting, values, [20])
    empty = fed(values, 20, 20) | {"past_key": key, "past_value": value}
    y, *caches = opened.run(None, empty)
    assert y.shape == (1, 0, 64)
    assert [c.tobytes() for c in caches] == [key.tobytes(), value.tobytes()]
    none = fed(values, 0, 0) | {"past_key": setting.blocks(0), "past_value": setting.blocks(0)}
    assert [x.shape[1] for x in opened.run(None, none)] == [0, 2, 2]


@CACHES
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_finite_is_no_crash(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, cache: str, value: float
) -> None:
    setting = Setting(rotated=8, norms=True, softcap=2.0, cache=cache)
    for isa in kernels.isas:
        monkeypatch.setenv("FLRC_EDGE_ISA", isa)
        for name in ("q", "k", "v"):
            values = inputs(setting, 20)
            values[name][0, 17, 3] = value
            y = run(session(kernels, setting), setting, values, [20])[0]
            assert np.isfinite(y[0, :17]).all()  # what came before it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 0}, "num_heads must be"),
        ({"num_heads": 3}, "num_heads must be"),
        ({"num_heads": 2**40}, "num_heads must be"),
        ({"kv_num_heads": 0}, "num_heads must be"),
        ({"kv_num_heads": -2}, "num_heads must be"),
        ({"kv_num_heads": 8}, "num_heads must be"),
        ({"head_dim": 0}, "head_dim must be"),
        ({"head_dim": 12}, "head_dim must be"),
        ({"head_dim": 520}, "head_dim must be"),
        ({"head_dim": -8}, "head_dim must be"),
        ({"window": -1}, "window must be"),
        ({"window": 2**40}, "window must be"),
        ({"scale": float("nan")}, "scale must be"),
        ({"softcap": -1.0}, "softcap must be"),
        ({"softcap": float("inf")}, "softcap must be"),
        ({"epsilon": float("nan")}, "epsilon must be"),
        ({"cache": "float64"}, "cache must be"),
        ({"cache": "float32 and much more of it"}, "cache must be"),
        ({"cache": None}, "cache"),
        ({"num_heads": None}, "num_heads"),
    ],
)
def test_attributes_that_do_not_fit(kernels: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        session(kernels, Setting(), change=change)


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": zeros(2, 4, 64)}, "q must be"),
        ({"q": zeros(1, 4, 65)}, "q must be"),
        ({"q": zeros(4, 64)}, "q must be"),
        ({"q": zeros(1, 4, 64, 1, 1)}, "q must be"),
        ({"k": zeros(1, 5, 32)}, "k and v must be"),
        ({"v": zeros(1, 4, 64)}, "k and v must be"),
        ({"v": zeros(1, 0, 32)}, "k and v must be"),
        ({"mask": zeros(1, 3, dtype=np.int64)}, "attention_mask must be"),
        ({"mask": zeros(1, 0, dtype=np.int64)}, "attention_mask must be"),
        ({"mask": zeros(24, dtype=np.int64)}, "attention_mask must be"),
        ({"mask": zeros(2, 24, dtype=np.int64)}, "attention_mask must be"),
        ({"mask": zeros(1, 2**24 + 1, dtype=np.int64)}, "attention_mask must be"),
        ({"mask": zeros(1, 37, dtype=np.int64)}, "fewer positions"),
        ({"past_key": zeros(1, 2, 2, 1023, dtype=np.uint8)}, "past must be"),
        ({"past_key": zeros(1, 1, 2, 1024, dtype=np.uint8)}, "past must be"),
        ({"past_key": zeros(2, 2, 2, 1024, dtype=np.uint8)}, "past must be"),
        ({"past_key": zeros(2, 2, 1024, dtype=np.uint8)}, "past must be"),
        ({"past_value": zeros(1, 2, 1, 1024, dtype=np.uint8)}, "past must be"),
        ({"past_value": zeros(1, 2, 2, 2048, dtype=np.uint8)}, "past must be"),
        ({"past_key": zeros(1, 2, 1, 1024, dtype=np.uint8), "past_value": zeros(1, 2, 1, 1024, dtype=np.uint8)},
         "fewer positions"),
        ({"cos": zeros(23, 8), "sin": zeros(23, 8)}, "fewer positions"),
        ({"cos": zeros(40, 9), "sin": zeros(40, 9)}, "cos and sin must be"),
        ({"cos": zeros(40, 0), "sin": zeros(40, 0)}, "cos and sin must be"),
        ({"cos": zeros(40, 8), "sin": zeros(40, 7)}, "cos and sin must be"),
        ({"cos": zeros(40, 8), "sin": zeros(30, 8)}, "cos and sin must be"),
        ({"cos": zeros(320), "sin": zeros(320)}, "cos and sin must be"),
        ({"q_norm": zeros(15)}, "norms must be"),
        ({"k_norm": zeros(1, 16)}, "norms must be"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit(kernels: Any, change: dict[str, Any], message: str) -> None:
    setting = Setting(rotated=8, norms=True)
    values = fed(inputs(setting, 24), 20, 24) | {
        "past_key": setting.blocks(2),
        "past_value": setting.blocks(2),
    }
    opened = session(kernels, setting)
    assert np.isfinite(opened.run(None, values)[0]).all()
    with pytest.raises(Exception, match=message):
        opened.run(None, values | change)


def test_cos_without_sin(kernels: Any) -> None:
    setting = Setting(rotated=8)
    values = inputs(setting, 4)
    values.pop("sin")
    with pytest.raises(Exception, match="come together"):
        run(session(kernels, setting, left="sin"), setting, values, [4])


def test_caches_that_overlap(kernels: Any) -> None:
    setting = Setting()
    opened, values = session(kernels, setting), inputs(setting, 20)
    one, other = (onnxruntime.OrtValue.ortvalue_from_numpy(setting.blocks(4)) for _ in range(2))
    binding = opened.io_binding()
    for name, array in fed(values, 0, 20).items():
        binding.bind_cpu_input(name, np.ascontiguousarray(array))
    for name, past in (("key", one), ("value", other)):
        binding.bind_ortvalue_input(f"past_{name}", past)
        binding.bind_ortvalue_output(f"present_{name}", one)
    binding.bind_output("y")
    with pytest.raises(Exception, match="same memory"):
        opened.run_with_iobinding(binding)
