"""Execution providers by name: what is not to be had is one sentence, and the next one is used."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest

import flrc_runtime
from flrc_runtime import UsageError, providers
from flrc_runtime.providers import CPU, QNN, WEBGPU, Provider, device_of, usable


@pytest.fixture(autouse=True)
def fresh() -> Any:
    providers._plugin.cache_clear()
    yield
    providers._plugin.cache_clear()


def test_names_and_options() -> None:
    assert Provider.parse("cpu") == Provider(CPU)
    assert Provider.parse("WebGPU").name == WEBGPU
    assert Provider.parse("qnn:soc_model=57,htp_arch=75") == Provider(
        QNN, {"soc_model": "57", "htp_arch": "75"}
    )
    assert Provider.parse("CUDAExecutionProvider:device_id=1").options == {"device_id": "1"}
    for text in ("cpu:x", "cpu:=1"):
        with pytest.raises(UsageError, match="is not NAME=VALUE"):
            Provider.parse(text)
    assert [device_of(Provider(n)) for n in (CPU, QNN, WEBGPU, "New")] == [None, None, "webgpu", "cpu"]


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_webgpu", None)
    with pytest.raises(UsageError, match="needs the package onnxruntime-ep-webgpu") as caught:
        usable(["webgpu"])
    assert caught.value.hint == "pip install 'flrc-edge[webgpu]'"
    with pytest.raises(UsageError, match="this onnxruntime has no Warp"):
        usable(["Warp", "webgpu"])
    with pytest.raises(UsageError, match="no execution provider is named"):
        usable([])
    with caplog.at_level(logging.WARNING):
        assert usable(["webgpu", "cpu"]) == [Provider(CPU)]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith("which is not installed; using CPUExecutionProvider")


def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    import onnxruntime

    register = onnxruntime.register_execution_provider_library

    def refuses(name: str, path: str) -> None:
        register(f"{name}2", path)  # a name that is free in this process

    library = tmp_path / "libqnn.so"
    library.write_bytes(b"no library")
    module = SimpleNamespace(get_library_path=lambda: str(library))
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", module)
    monkeypatch.setattr(
        "onnxruntime.get_ep_devices", list
    )  # other tests of this process may have registered it
    monkeypatch.setattr("onnxruntime.register_execution_provider_library", refuses)
    with pytest.raises(UsageError, match=r"QNNExecutionProvider of onnxruntime-qnn does not load") as caught:
        usable(["qnn"])
    assert "\n" not in str(caught.value)


def test_an_onnxruntime_without_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", SimpleNamespace())
    monkeypatch.delattr(onnxruntime, "register_execution_provider_library")
    with pytest.raises(UsageError, match="takes no plug-ins"):
        usable(["qnn"])


def test_a_graph_that_the_first_provider_cannot_run(
    bundle: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Options that onnxruntime refuses stand for a device that refuses the graph."""
    from flrc_runtime import sessions

    def refuses(options: object, provider: Provider) -> None:
        raise RuntimeError("no adapter")

    monkeypatch.setattr(sessions, "add_provider", refuses)
    azure = Provider("AzureExecutionProvider")
    with caplog.at_level(logging.WARNING):
        model = flrc_runtime.load(bundle.folder, providers=[azure, "cpu"], threads=1)
    assert caplog.messages == [
        "AzureExecutionProvider cannot run stage_0.onnx (no adapter); using CPUExecutionProvider"
    ]
    assert len(flrc_runtime.generate(model, "Once", max_tokens=4, chat=False).token_ids) == 4
    with pytest.raises(flrc_runtime.FormatError, match="no adapter"):
        flrc_runtime.load(bundle.folder, providers=[azure], threads=1)
