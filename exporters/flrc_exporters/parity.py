"""The check before a bundle is published: what was written is what the checkpoint holds, and it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from flrc_runtime import kernels
from flrc_runtime.errors import NumericalError, VerificationError
from flrc_runtime.sessions import LOGITS_START, NOT_FINITE

from .architectures import DecoderConfig
from .number_format import Bytes, Float, dequantize
from .source import CheckpointTensors
from .tiles import BLOCK, filled, float_values, scale_values, unpack_tiles
from .weight_table import Matrix, Order, Recipe, Stored, Tiles, Vector
from .weights import float_matrix, integer_values, order_values, quantized_slabs, slabs, vector_values

# Largest ‖ŵ − w‖ / ‖w‖ of a matrix rounded to nearest. Gaussian weights give 0.007 and 0.08;
# a zeroed, permuted or wrongly scaled matrix gives 0.5 and more.
TOLERANCE = {32: 0.0, 8: 0.03, 4: 0.25}
EXACT = 1e-6  # of integers that the checkpoint holds
PROBE_TOKENS = 8


def check_values(
    path: Path,
    table: Mapping[str, Stored],
    recipes: Sequence[Recipe],
    source: CheckpointTensors,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Read every tensor of ``weights.bin`` back and compare it with the checkpoint, in norm and direction.

    ``progress`` gets the number compared and the number of all.

    Returns:
        The relative error ``‖ŵ − w‖ / ‖w‖`` of every matrix, by its name in the graph.

    Raises:
        VerificationError: A tensor differs by more than rounding explains.
    """
    errors: dict[str, float] = {}
    for i, recipe in enumerate(recipes):
        if isinstance(recipe, Vector):
            stored = table[recipe.name].read(path)
            if not np.array_equal(stored, vector_values(source, recipe)):
                raise _differs(recipe.name, 1.0)
        elif isinstance(recipe, Order):
            if not np.array_equal(table[recipe.name].read(path), order_values(source, recipe)):
                raise _differs(recipe.name, 1.0)
        elif isinstance(recipe, Tiles):
            errors[recipe.name] = _tiles_error(path, table[f"{recipe.name}.tiles"], recipe, source)
        else:
            errors[recipe.name] = _matrix_error(path, table, recipe, source)
        if progress is not None:
            progress(i + 1, len(recipes))
    return errors


def _tiles_error(path: Path, stored: Stored, recipe: Tiles, source: CheckpointTensors) -> float:
    """Return the error of a matrix in tiles, read back; its integers must be those of the checkpoint."""
    (rows, inputs), bits = recipe.shape, recipe.format.bits
    data = np.asarray(stored.read(path)).view(np.uint8)
    given = source.holds_integers(recipe.tensors[0])
    if given:
        integers, scales = integer_values(source, recipe)
        wanted = integers.reshape(rows, -1, BLOCK) * scales[..., None]
        wanted = wanted.reshape(rows, -1)[:, :inputs]
    else:
        wanted = float_matrix(source, recipe)
    if bits == 32:
        written = float_values(data, rows, inputs)
    else:
        found, codes = unpack_tiles(data, rows, filled(inputs), bits)
        if given and not np.array_equal(found, integers):
            raise _differs(recipe.name, 1.0)
        written = found.reshape(rows, -1, BLOCK) * scale_values(codes, stored.unit)[..., None]
        written = written.reshape(rows, -1)[:, :inputs]
    norm = float(np.linalg.norm(wanted.astype(np.float64)))
    error = float(np.linalg.norm((written - wanted).astype(np.float64))) / (norm or 1.0)
    if not np.isfinite(error) or error > (EXACT if given else TOLERANCE[bits]):
        raise _differs(recipe.name, error)
    return error


def _matrix_error(
    path: Path, table: Mapping[str, Stored], matrix: Matrix, source: CheckpointTensors
) -> float:
    if source.holds_integers(matrix.pieces[0].tensor):
        for start, integers, scales in quantized_slabs(source, matrix):
            stored = _read_integers(path, table, matrix, start, start + len(scales))
            if not (np.array_equal(stored[0], integers) and np.array_equal(stored[1], scales)):
                raise _differs(matrix.name, 1.0)
        return 0.0
    difference = norm = written_norm = product = 0.0
    for start, wanted in slabs(source, matrix):
        written = _read_rows(path, table, matrix, start, start + len(wanted))
        difference += float(np.square(written - wanted, dtype=np.float64).sum())
        norm += float(np.square(wanted, dtype=np.float64).sum())
        written_norm += float(np.square(written, dtype=np.float64).sum())
        product += float(np.multiply(written, wanted, dtype=np.float64).sum())
    tolerance = TOLERANCE[matrix.format.bits]
    error = float(np.sqrt(difference / norm)) if norm else float(written_norm > 0)
    correlation = (
        product / np.sqrt(norm * written_norm) if norm * written_norm > 0 else float(norm == written_norm)
    )
    if not np.isfinite(error) or error > tolerance or correlation < 1 - tolerance**2 - 1e-6:
        raise _differs(matrix.name, error)
    return error


def _read_rows(path: Path, table: Mapping[str, Stored], matrix: Matrix, start: int, stop: int) -> Float:
    if not matrix.format.quantized:
        weight = table[f"{matrix.name}.weight"].read(path)
        rows = weight[:, start:stop].T if matrix.transposed else weight[start:stop]
        return np.asarray(rows, np.float32)
    packed, scales = _read_integers(path, table, matrix, start, stop)
    return dequantize(packed, scales, matrix.shape[1], block=matrix.format.block_size)


def _read_integers(
    path: Path, table: Mapping[str, Stored], matrix: Matrix, start: int, stop: int
) -> tuple[Bytes, Float]:
    name = f"{matrix.name}.{'qrows' if matrix.is_embedding else 'qweight'}"
    out, blocks, size = matrix.format.packed_shape(*matrix.shape)
    packed: Bytes = table[name].read(path).reshape(out, blocks, size)[start:stop]  # type: ignore[assignment]
    scales: Float = table[f"{matrix.name}.scales"].read(path)[start:stop]  # type: ignore[assignment]
    return packed, scales


def _differs(name: str, error: float) -> VerificationError:
    return VerificationError(
        f"the exported {name} differs from the checkpoint by {error:.0%} of its norm",
        hint="nothing was written; please report this with the checkpoint's flrc.json",
    )


def check_graph(path: Path, config: DecoderConfig, *, context: int, own: bool) -> None:
    """Load a stage in onnxruntime and run a short prompt and one step.

    Args:
        path: The graph.
        config: The decoder.
        context: Positions (tokens) that it may hold.
        own: Whether it is of the project's own operators.

    Raises:
        NumericalError: A logit is not finite.
        VerificationError: onnxruntime does not load or run the graph.
        FlrcError: The library of operators is not here.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if own:
        kernels.register(options)
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        rows = session.get_inputs()[-1]  # of the cache, of bytes or floats
        kind = np.uint8 if own else np.float32
        past = [np.zeros((1, config.num_kv_heads, 0, rows.shape[-1]), kind)] * (2 * config.num_layers)
        length = min(PROBE_TOKENS, context - 1)
        ids = np.linspace(0, config.vocab_size - 1, length).astype(np.int64)[None]
        logits, *past = session.run(None, _feeds(config, ids, past, length))
        step, *_ = session.run(None, _feeds(config, ids[:, :1], past, length + 1))
    except Exception as error:  # onnxruntime raises its own classes, which share no public base
        if str(error).endswith(NOT_FINITE):
            raise NumericalError(f"{path.name} meets numbers that are not finite") from None
        raise VerificationError(f"onnxruntime cannot run {path.name}: {error}") from error
    if not (np.isfinite(logits).all() and np.isfinite(step).all()):
        raise NumericalError(f"{path.name} gives logits that are not finite")


def check_static_graph(path: Path) -> None:
    """Load a graph of fixed shapes in onnxruntime and run it on token 0 at position 0.

    Raises:
        NumericalError: A logit is not finite.
        VerificationError: onnxruntime does not load or run the graph.
    """
    kinds = {"tensor(int32)": np.int32, "tensor(float)": np.float32}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds = {node.name: np.zeros(node.shape, kinds[node.type]) for node in session.get_inputs()}
        (logits,) = session.run(["logits"], feeds)
    except Exception as error:  # onnxruntime raises its own classes, which share no public base
        raise VerificationError(f"onnxruntime cannot run {path.name}: {error}") from error
    if not np.isfinite(logits).all():
        raise NumericalError(f"{path.name} gives logits that are not finite")


def _feeds(
    config: DecoderConfig, ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]], past: list[Float], total: int
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    feeds: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = {
        "input_ids": ids,
        "attention_mask": np.ones((1, total), np.int64),
    }
    if past[0].dtype == np.uint8:
        feeds[LOGITS_START] = np.zeros(1, np.int64)
    for i in range(config.num_layers):
        feeds[f"past_key_values.{i}.key"] = past[2 * i]
        feeds[f"past_key_values.{i}.value"] = past[2 * i + 1]
    return feeds
