"""Sizes said before an export are those after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flrc_exporters.bundle import export
from flrc_exporters.sizes import bundle_size


@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4/64"])
@pytest.mark.parametrize("stored", ["compressed_stories", "pivoted_stories"])
def test_sizes_are_those_of_the_export(
    stored: str, dtype: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    stories = request.getfixturevalue(stored)
    manifest = export(stories.checkpoint, tmp_path / "bundle", dtype=dtype)
    size = bundle_size(stories.source.config, manifest.plan, context=manifest.model.context_length)
    assert size.file == (tmp_path / "bundle" / "weights.bin").stat().st_size
    assert list(size.stages) == [s.bytes for s in manifest.stages]
