"""The tensors of a checkpoint folder, read one slice at a time as float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from flrc_runtime.errors import FormatError, NumericalError
from flrc_runtime.files import resolve_inside

from .number_format import Bytes, Float

FILES = ("factors.safetensors", "base.safetensors")


class CheckpointTensors:
    """Every tensor of ``factors.safetensors`` and ``base.safetensors`` by name.

    Args:
        folder: The checkpoint.

    Raises:
        FormatError: A file is damaged or truncated.
        VerificationError: A file is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._slices: dict[str, Any] = {}
        self._files = []
        for name in FILES:
            path = resolve_inside(folder, name)
            try:
                file: Any = safe_open(path, framework="numpy")
                self._slices |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise FormatError(
                    f"{folder.name}/{name} cannot be read: {error}", hint="copy or compress again"
                ) from None
            self._files.append(file)

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors."""
        return tuple(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Raises:
            FormatError: There is no such tensor.
        """
        if name not in self._slices:
            raise FormatError(
                f"{self.folder.name}: tensor {name} is missing", hint="compress the model again"
            )
        return tuple(self._slices[name].get_shape())

    def read(self, name: str, rows: slice = slice(None)) -> Float:
        """Read a tensor or a part of it.

        Args:
            name: The tensor.
            rows: Along the first dimension.

        Raises:
            FormatError: There is no such tensor.
            NumericalError: It holds a value that is not finite.
        """
        self.shape(name)
        values = np.asarray(self._slices[name][rows], dtype=np.float32)
        if not np.isfinite(values).all():
            raise NumericalError(f"{self.folder.name}: tensor {name} holds a value that is not finite")
        return values

    def holds_integers(self, name: str) -> bool:
        """Whether a matrix is stored as integers and scales."""
        return f"{name}.q" in self._slices

    def read_integers(self, name: str, rows: slice = slice(None)) -> tuple[Bytes, Float]:
        """Read some rows of a matrix of integers as ``(packed [out, blocks, bytes], scales [out, blocks])``.

        Raises:
            FormatError: There is no such matrix, or it is of another type.
            NumericalError: A scale is not finite.
        """
        self.shape(f"{name}.q")
        packed = np.asarray(self._slices[f"{name}.q"][rows])
        if packed.dtype != np.uint8:
            raise FormatError(
                f"{self.folder.name}: {name}.q is {packed.dtype}, not uint8", hint="compress the model again"
            )
        return packed, self.read(f"{name}.scales", rows)

    def permutation(self, name: str) -> npt.NDArray[np.int64]:
        """Read the order of a pivoted chunk's outputs.

        Raises:
            FormatError: There is no such tensor, or it does not name every output once.
        """
        self.shape(name)
        order = np.asarray(self._slices[name][:])
        if order.dtype != np.int64 or not np.array_equal(np.sort(order), np.arange(order.size)):
            raise FormatError(
                f"{self.folder.name}: tensor {name} is not a permutation", hint="compress the model again"
            )
        return order
