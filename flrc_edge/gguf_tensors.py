"""The tensors of a GGUF file: their Hugging Face names, and their values dequantized to float32.

Everything that can be known without the values (name, shape, type, length of the file) is checked first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flrc_exporters.architectures import DecoderConfig
from flrc_runtime.errors import FormatError, UnsupportedModelError

from .gguf_header import GgufHeader, GgufTensor

EMBEDDING, HEAD, ROPE = "token_embd.weight", "output.weight", "rope_freqs.weight"
_TOP = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_BLOCK = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)\Z")


def dropped_matrix(header: GgufHeader, *, tie: bool) -> str | None:
    """Return which of embedding and head need not be read because the other one is the same matrix.

    Args:
        header: Of the file.
        tie: Take them for two roundings of one matrix and keep the finer; otherwise only a head that is the
            embedding bit for bit is not read.
    """
    if EMBEDDING not in header.tensors or HEAD not in header.tensors:
        return None
    embedding, head = header.tensors[EMBEDDING], header.tensors[HEAD]
    if embedding.shape != head.shape:
        return None
    if tie:
        return min((HEAD, EMBEDDING), key=lambda name: bits_per_weight(header, header.tensors[name]))
    if embedding.type_number != head.type_number:
        return None
    a, b = raw_bytes(header, embedding), raw_bytes(header, head)
    step = 1 << 24
    same = all(np.array_equal(a[i : i + step], b[i : i + step]) for i in range(0, len(a), step))
    return HEAD if same else None


def check_tensors(header: GgufHeader, config: DecoderConfig, *, dropped: str | None) -> None:
    """Compare names, shapes and types with what the configuration calls for; read no values.

    Raises:
        FormatError: A tensor is missing, has another shape or ends after the file.
        UnsupportedModelError: One has no place in the model, or cannot be dequantized.
    """
    file, family = header.path.name, str(header.fields["general.architecture"])
    expected: dict[str, tuple[int, ...]] = {f"{p.name}.weight": p.shape for p in config.projections()}
    expected |= config.other_tensors()
    missing = dict.fromkeys(expected)
    for name, tensor in header.tensors.items():
        raw_bytes(header, tensor)
        if name in (dropped, ROPE):  # what rotary factors mean stands in the configuration
            continue
        target = _target(header, name, dropped)
        if target not in expected:
            raise UnsupportedModelError(f"{file}: the tensor {name} has no place in this {family}")
        if tensor.shape != expected[target]:
            raise FormatError(
                f"{file}: {name} is {list(tensor.shape)}, the header says {list(expected[target])}"
            )
        missing.pop(target, None)
    for target in missing:
        if not target.endswith(".bias"):
            raise FormatError(f"{file}: the tensor of {target} is missing", hint="download the file again")


def bits_per_weight(header: GgufHeader, tensor: GgufTensor) -> float:
    """Return the bits that one weight takes."""
    block, size = _block(header, tensor)
    return 8 * size / block


def raw_bytes(header: GgufHeader, tensor: GgufTensor) -> NDArray[np.uint8]:
    """Return the bytes of a tensor as they lie in the file.

    Raises:
        FormatError: The file ends before it.
        UnsupportedModelError: It is of a type that cannot be dequantized.
    """
    block, size = _block(header, tensor)
    if not math.prod(tensor.shape) or not tensor.shape or tensor.shape[-1] % block:
        raise FormatError(f"{header.path.name}: {tensor.name} is {list(tensor.shape)}, in blocks of {block}")
    length = math.prod(tensor.shape) // block * size
    if tensor.offset + length > header.path.stat().st_size:
        raise FormatError(
            f"{header.path.name} is truncated or damaged (it ends before {tensor.name})",
            hint="download the file again",
        )
    return np.memmap(header.path, np.uint8, mode="r", offset=tensor.offset, shape=(length,))


def dequantized(header: GgufHeader, tensor: GgufTensor) -> NDArray[np.float32]:
    """Return the values of a tensor in float32.

    Raises:
        FormatError: One of them is not finite.
    """
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(tensor.type_number)
    raw = raw_bytes(header, tensor).reshape(*tensor.shape[:-1], -1)
    if kind == GGMLQuantizationType.F64:
        weight = raw.view(np.float64).astype(np.float32)
    else:
        with np.errstate(all="ignore"):  # a scale that is not finite is named below
            weight = np.asarray(dequantize(raw, kind), dtype=np.float32)
    if not math.isfinite(float(weight.sum(dtype=np.float64))):
        raise FormatError(f"{header.path.name}: {tensor.name} holds a value that is not finite")
    return weight.reshape(tensor.shape)


def hf_tensors(
    header: GgufHeader, config: DecoderConfig, *, dropped: str | None
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield the tensors of the Hugging Face model by name, in float32.

    Raises:
        FormatError: A value is not finite.
    """
    family = str(header.fields["general.architecture"])
    biases = {name: shape for name, shape in config.other_tensors().items() if name.endswith(".bias")}
    for name, tensor in header.tensors.items():
        if name in (dropped, ROPE):
            continue
        weight = dequantized(header, tensor)
        if family == "llama" and ".attn_q." in name:
            weight = _rotary_halves(weight, config.num_heads)
        elif family == "llama" and ".attn_k." in name:
            weight = _rotary_halves(weight, config.num_kv_heads)
        elif family == "gemma3" and name.endswith("norm.weight"):
            weight = weight - 1.0  # llama.cpp stores the factor, Hugging Face what is added to 1
        target = _target(header, name, dropped)
        biases.pop(target, None)
        yield target, np.ascontiguousarray(weight, dtype=np.float32)
    for name, shape in biases.items():  # llama.cpp takes each one alone, Hugging Face all or none
        yield name, np.zeros(shape, np.float32)


def _block(header: GgufHeader, tensor: GgufTensor) -> tuple[int, int]:
    """Return weights and bytes of one block of a tensor's type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    where = f"{header.path.name}: {tensor.name}"
    try:
        kind = GGMLQuantizationType(tensor.type_number)
    except ValueError:
        raise UnsupportedModelError(
            f"{where} is of type {tensor.type_number}, which the installed gguf package does not know",
            hint="pip install --upgrade gguf",
        ) from None
    sizes: tuple[int, int] = GGML_QUANT_SIZES[kind]
    try:
        if kind != GGMLQuantizationType.F64:
            dequantize(np.zeros((1, sizes[1]), np.uint8), kind)
    except NotImplementedError:
        raise UnsupportedModelError(f"{where} is {kind.name}, which cannot be dequantized") from None
    return sizes


def _target(header: GgufHeader, name: str, dropped: str | None) -> str:
    """Return the Hugging Face name of a tensor."""
    if name in _TOP:
        return _TOP[EMBEDDING] if name == HEAD and dropped == EMBEDDING else _TOP[name]
    family: Any = header.fields["general.architecture"]
    match = _BLOCK_NAME.match(name)
    table = {**_BLOCK, **_GEMMA_BLOCK} if family == "gemma3" else _BLOCK
    if match is None or match[2] not in table:
        raise UnsupportedModelError(f"{header.path.name}: the tensor {name} has no place in a {family}")
    return f"model.layers.{match[1]}.{table[match[2]]}.{match[3]}"


def _rotary_halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's interleaving of rotary pairs: (heads, d/2, 2, …) -> (heads, 2, d/2, …)."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
