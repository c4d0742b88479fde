"""What a stage graph may hold: looked at before onnxruntime's parser and kernels see the file.

Only the operators that ``export`` writes, no graph inside an operator, no function, and weights in a file that the
manifest lists. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from .errors import FlrcError, FormatError
from .protobuf import fields

Operators = Mapping[str, set[str]]  # by domain
GraphForm = Literal["own", "stock", "static"]
OWN = {"flrc": {"Attention", "Embedding", "Linear"}}
STOCK = {
    "": {
        *("Add", "Cast", "CastLike", "Concat", "Gather", "Gelu", "MatMul", "Mul", "ReduceSum", "Reshape"),
        *("Shape", "Slice", "Split", "Sub"),
    },
    "com.microsoft": {
        *("FusedMatMul", "GatherBlockQuantized", "GroupQueryAttention", "MatMulNBits", "QuickGelu"),
        *("RotaryEmbedding", "SkipSimplifiedLayerNormalization"),
    },
}
STATIC = {
    "": {
        *("Add", "Concat", "DequantizeLinear", "Gather", "Gelu", "Gemm", "MatMul", "Mul", "Neg"),
        *("QuantizeLinear", "RMSNormalization", "Reshape", "Sigmoid", "Slice", "Softmax", "Split"),
        *("Transpose", "Unsqueeze"),
    },
    "com.microsoft": {"EPContext", "GatherBlockQuantized", "MatMulNBits"},
}
KNOWN: Mapping[GraphForm, Operators] = {"own": OWN, "stock": STOCK, "static": STATIC}
_COMPILED = "EPContext"  # a part of the graph that was compiled for one accelerator

_MODEL_GRAPH, _MODEL_OPSET, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 8, 20, 25
_OPSET_DOMAIN = 1
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE_INITIALIZER = 1, 5, 15
_NODE_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_STRING = 1, 4
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_TENSOR_EXTERNAL = 13


def check_graph_file(path: Path, sizes: Mapping[str, int], form: GraphForm) -> None:
    """Refuse a graph that holds what ``export`` does not write.

    Args:
        path: The graph.
        sizes: Bytes of the files, by name, that its weights or compiled parts may lie in.
        form: Which operators it may consist of: our own, onnxruntime's, or those of fixed shapes.

    Raises:
        FormatError: It is no graph, or one with an operator, a function or weights of another kind.
    """
    where = f"{path.parent.name}/{path.name}"
    graphs = 0
    used: set[str] = set()
    imported: set[str] = set()
    try:
        for part in fields(memoryview(path.read_bytes())):
            if part.number in (_MODEL_TRAINING, _MODEL_FUNCTIONS):
                raise FormatError("it holds functions or a way to train")
            if part.number == _MODEL_OPSET and part.value is not None:
                imported.add(_domain(part.value))
            if part.number == _MODEL_GRAPH and part.value is not None:
                graphs += 1
                used |= _check_graph(part.value, sizes, KNOWN[form])
        if graphs != 1:
            raise FormatError(f"it holds {graphs} graphs")
        if not used <= imported:
            raise FormatError("it does not import the operators it needs")
    except (FlrcError, OSError, UnicodeDecodeError, ValueError) as error:
        raise FormatError(
            f"{where} is not a graph that export writes: {error}",
            hint="get the bundle again, from people you trust",
        ) from None


def cache_numbers(path: Path) -> str | None:
    """Return in which numbers a graph of our own operators keeps keys and values; None of other graphs.

    Raises:
        FormatError: It is no graph.
        OSError: It cannot be read.
    """
    for part in fields(memoryview(path.read_bytes())):
        if part.number != _MODEL_GRAPH or part.value is None:
            continue
        for node in fields(part.value):
            if node.number != _GRAPH_NODE or node.value is None:
                continue
            for attribute in fields(node.value):
                if attribute.number == _NODE_ATTRIBUTE and attribute.value is not None:
                    found = {f.number: bytes(f.value) for f in fields(attribute.value) if f.value is not None}
                    if found.get(_ATTRIBUTE_NAME) == b"cache":
                        return found.get(_ATTRIBUTE_STRING, b"").decode(errors="replace")
    return None


def _domain(opset: memoryview) -> str:
    names = [
        bytes(f.value).decode() for f in fields(opset) if f.number == _OPSET_DOMAIN and f.value is not None
    ]
    return names[0] if names else ""


def _check_graph(graph: memoryview, sizes: Mapping[str, int], known: Operators) -> set[str]:
    """Return the domains of its operators."""
    used: set[str] = set()
    for part in fields(graph):
        if part.number == _GRAPH_SPARSE_INITIALIZER:
            raise FormatError("it holds sparse weights")
        if part.value is None:
            continue
        if part.number == _GRAPH_NODE:
            used.add(_check_node(part.value, sizes, known))
        elif part.number == _GRAPH_INITIALIZER:
            _check_tensor(part.value, sizes)
    return used


def _check_node(node: memoryview, sizes: Mapping[str, int], known: Operators) -> str:
    """Return the domain of its operator."""
    kind, domain, binary = "", "", ""
    for part in fields(node):
        if part.value is None:
            continue
        if part.number == _NODE_TYPE:
            kind = bytes(part.value).decode()
        elif part.number == _NODE_DOMAIN:
            domain = bytes(part.value).decode()
        elif part.number == _NODE_ATTRIBUTE:
            binary = _check_attribute(part.value) or binary
    if kind == _COMPILED and binary and binary not in sizes:  # further parts of one file name none
        raise FormatError("what was compiled is in no file of this folder")
    domain = "" if domain == "ai.onnx" else domain
    if kind not in known.get(domain, ()):
        raise FormatError(f"the operator {f'{domain}.' if domain else ''}{kind} is not known")
    return domain


def _check_attribute(attribute: memoryview) -> str:
    """Refuse what no operator needs; return the file of a compiled part, if that is what the attribute names."""
    name, text = "", ""
    for part in fields(attribute):
        if part.value is not None and part.number == _ATTRIBUTE_NAME:
            name = bytes(part.value).decode()
        elif part.value is not None and part.number == _ATTRIBUTE_STRING:
            text = bytes(part.value).decode(errors="replace")
        if part.number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_TENSORS):
            raise FormatError("an operator holds a graph or a list of tensors")
        if part.number == _ATTRIBUTE_TENSOR and part.value is not None:
            _check_tensor(part.value, {})
    return text if name == "ep_cache_context" else ""


def _check_tensor(tensor: memoryview, sizes: Mapping[str, int]) -> None:
    external: dict[str, str] = {}
    for part in fields(tensor):
        if part.number == _TENSOR_EXTERNAL and part.value is not None:
            entry = [bytes(f.value).decode() for f in fields(part.value) if f.value is not None]
            if len(entry) != 2 or entry[0] in external:
                raise FormatError("a place of weights is said twice or by half")
            external[entry[0]] = entry[1]
    if not external:
        return
    location = external.get("location", "")
    if location not in sizes:
        raise FormatError(f"weights lie in {location!r}, which the manifest does not list for them")
    offset, length = (_count(external.get(name, "0")) for name in ("offset", "length"))
    if offset + length > sizes[location]:
        raise FormatError(f"weights end at byte {offset + length} of {location}, which has {sizes[location]}")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise FormatError(f"{text!r} is no place in a file")
    return int(text)
