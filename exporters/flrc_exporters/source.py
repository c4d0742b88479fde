"""The tensors of a checkpoint folder, read one slice at a time as float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from flrc_runtime.errors import FormatError, NumericalError
from flrc_runtime.files import resolve_inside

from .number_format import Float

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

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> Float:
        """Read a tensor or a part of it.

        Args:
            name: The tensor.
            rows: Along the first dimension.
            columns: Along the second, or None for a vector or for all.

        Raises:
            FormatError: There is no such tensor.
            NumericalError: It holds a value that is not finite.
        """
        self.shape(name)
        part = self._slices[name][rows] if columns is None else self._slices[name][rows, columns]
        values = np.asarray(part, dtype=np.float32)
        if not np.isfinite(values).all():
            raise NumericalError(f"{self.folder.name}: tensor {name} holds a value that is not finite")
        return values
