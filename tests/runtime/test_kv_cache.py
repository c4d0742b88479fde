"""One cache for all stages: nothing moves at a switch, and it can be cut back."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flrc_runtime import FlrcError, UsageError
from flrc_runtime.engine import Model
from flrc_runtime.kv_cache import KvCache, KvShape


def test_a_switch_moves_and_copies_no_buffer(model: Model, positions: Any) -> None:
    decoder = model.decoder()
    decoder.prefill([1, 403, 407], 0)
    before = decoder.cache.pointers()
    filled = [v.copy() for v in positions(decoder.cache)]
    for stage in (0, 1, 0, 1, 1):
        decoder.step(261, stage)
        assert decoder.cache.pointers() == before
    assert len(before) == len(set(before)) == 10
    for old, value in zip(filled, positions(decoder.cache), strict=True):
        assert np.array_equal(old[:, :3], value[:, :3])  # what stage 0 wrote is what stage 1 reads
        assert value[:, 3:8].any() and not value[:, 8:].any()
    decoder.close()


def test_rollback_forgets(model: Model) -> None:
    ids = model.tokenizer.encode("Once upon a time, there was")
    decoder = model.decoder()
    expected = decoder.feed(ids, 0)[-1].copy()
    decoder.feed([300, 301, 302], 1)
    decoder.cache.rollback(len(ids) - 1)
    assert np.abs(decoder.step(ids[-1], 0) - expected).max() < 1e-4
    with pytest.raises(UsageError, match="cannot roll back to 99"):
        decoder.cache.rollback(99)
    decoder.close()


def test_a_step_past_the_context_is_refused(bundle) -> None:
    from flrc_runtime import load

    decoder = load(bundle.folder, context=4, threads=1).decoder()
    decoder.prefill([1, 2, 3, 4], 0)
    with pytest.raises(FlrcError, match="outside the context of 4"):
        decoder.step(5, 0)


def test_abandoned_streams_free_their_buffers(model: Model) -> None:
    def caches() -> int:
        gc.collect()
        return sum(type(o) is KvCache for o in gc.get_objects())

    before = caches()
    for cycle in range(20):
        stream = model.stream("Once upon a time", max_tokens=20)
        next(stream)
        if cycle % 3 == 0:
            stream.close()
        elif cycle % 3 == 1:
            with pytest.raises(KeyboardInterrupt):
                stream.throw(KeyboardInterrupt)
        del stream
    assert caches() == before
    assert next(model.stream("Once upon a time")).text


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this system does not tell memory")
def test_unused_context_costs_no_memory() -> None:
    """Of the second cache as well, which numpy would put into used heap memory."""

    def anonymous() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

    shape = KvShape(layers=30, heads=3, width=64 * 16 * 4, positions=16)
    size = shape.bytes_for(2048)
    KvCache(shape, 64).close()  # imports
    before = anonymous()
    for _ in range(3):
        cache = KvCache(shape, 2048)
        assert len(set(cache.pointers())) == 60 and all(p % 64 == 0 for p in cache.pointers())
        assert anonymous() - before < size / 10
        cache.close()
