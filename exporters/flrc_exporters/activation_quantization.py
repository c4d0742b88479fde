"""Graphs of fixed shape with 8-bit weights and 16-bit activations (QDQ), calibrated on given tokens.

onnxruntime's quantization tools do the work, with the settings they have for QNN.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flrc_runtime.engine import Model
from flrc_runtime.errors import FlrcError
from flrc_runtime.window_decoder import WindowDecoder

FEEDS = 8  # of a window: SmolLM2-135M's window of 256 positions is 12 MB in each
LARGE = 10**9  # bytes of weights that do not go into one protobuf with what calibration adds

Feed = Mapping[str, Any]


def calibration_feeds(
    model: Model, windows: Sequence[Sequence[int]], stage: int, *, prefill: int | None
) -> list[Feed]:
    """Return what one graph is given on the way through some texts.

    Args:
        model: A static bundle on the CPU.
        windows: Token ids of each text.
        stage: Of the graph.
        prefill: Tokens that the graph takes of a prompt; None for the graph of one token.
    """
    found: list[Feed] = []
    size = prefill or 1
    for ids in windows:
        decoder = model.decoder()
        assert isinstance(decoder, WindowDecoder)
        starts = range(0, len(ids) - size + 1, size)
        wanted = {starts[i * len(starts) // FEEDS] for i in range(FEEDS)} if starts else set()
        for start in starts:
            piece = ids[start : start + size]
            if start in wanted:
                found.append(decoder.feeds(piece, stage, prefill=prefill is not None))
            decoder.prefill(piece, stage)
        decoder.close()
    return found


def quantize_graph(source: Path, target: Path, feeds: Sequence[Feed]) -> None:
    """Write a graph whose products have int8 weights and uint16 activations.

    Args:
        source: Of fixed shape, in float32.
        target: The graph to write.
        feeds: What ranges of activations are measured on; one at least.

    Raises:
        FlrcError: There is nothing to calibrate on, or the tools refuse the graph.
    """
    from onnxruntime.quantization import QuantType, quantize
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    if not feeds:
        raise FlrcError(
            f"{source.name} takes more tokens than the calibration texts have", hint="lower --prefill"
        )
    weights = source.parent / "weights.bin"
    try:
        with _quiet():
            config = get_qnn_qdq_config(
                str(source), _Reader(feeds), activation_type=QuantType.QUInt16, weight_type=QuantType.QInt8
            )
            config.use_external_data_format = weights.exists() and weights.stat().st_size > LARGE
            quantize(str(source), str(target), config)
    except Exception as error:  # its errors share no base of their own
        reason = str(error).split("\n")[0][:300]
        raise FlrcError(f"{source.name} could not be quantized: {reason}") from error


class _Reader:
    """Hands out feeds, as onnxruntime's ``CalibrationDataReader`` does."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        """Return the next feed, None behind the last."""
        return next(self._feeds, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tools' advice (to run their own optimizer first) out of our log."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
