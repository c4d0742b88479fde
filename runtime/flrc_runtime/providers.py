"""Execution providers by name: onnxruntime's own, and plug-ins that come in packages of their own."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    from onnxruntime import SessionOptions

CPU, WEBGPU, QNN = "CPUExecutionProvider", "WebGpuExecutionProvider", "QNNExecutionProvider"
_SHORT = {"cpu": CPU, "webgpu": WEBGPU, "qnn": QNN}
# Provider -> the module that holds its library, and the extra of pyproject.toml that brings it.
_PLUGINS = {WEBGPU: ("onnxruntime_ep_webgpu", "webgpu"), QNN: ("onnxruntime_qnn", "qnn")}
# Providers that work in the host's memory; onnxruntime's name of the memory of the others.
_HOST = (CPU, QNN, "AzureExecutionProvider", "XnnpackExecutionProvider")
_DEVICES = {WEBGPU: "webgpu", "CUDAExecutionProvider": "cuda", "DmlExecutionProvider": "dml"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Provider:
    """An execution provider.

    Args:
        name: As onnxruntime has it.
        options: Of this provider.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Provider:
        """Read ``cpu``, ``webgpu``, ``qnn`` or onnxruntime's name, and options: ``qnn:soc_model=57,htp_arch=75``.

        Raises:
            UsageError: An option is not NAME=VALUE.
        """
        name, _, rest = text.partition(":")
        options = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            if not (key and equals):
                raise UsageError(f"{part!r} of provider {text!r} is not NAME=VALUE")
            options[key] = value
        return cls(_SHORT.get(name.lower(), name), options)


def usable(wanted: Sequence[str | Provider]) -> list[Provider]:
    """Return the providers from the first one on that this machine has.

    One that it lacks is passed over with one line if another follows, so ``("webgpu", "cpu")`` runs anywhere.

    Raises:
        UsageError: It has none of them.
    """
    providers = [Provider.parse(p) if isinstance(p, str) else p for p in wanted]
    reasons = []
    for i, provider in enumerate(providers):
        try:
            _check(provider)
        except UsageError as error:
            reasons.append(error)
            continue
        for reason in reasons:
            _log.warning("%s; using %s", reason, provider.name)
        return providers[i:]
    raise reasons[0] if reasons else UsageError("no execution provider is named", hint="name cpu")


def add_provider(options: SessionOptions, provider: Provider) -> None:
    """Let a session use a provider that :func:`usable` returned, before those that are added later."""
    import onnxruntime

    if provider.name not in _PLUGINS:
        options.add_provider(provider.name, dict(provider.options))
        return
    module = _plugin(provider.name)
    devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == provider.name]
    defaults = {"backend_path": module.get_qnn_htp_path()} if provider.name == QNN else {}
    options.add_provider_for_devices(devices[:1], defaults | dict(provider.options))


def device_of(provider: Provider) -> str | None:
    """Return onnxruntime's name of the memory that a provider works in, None for the host's.

    A provider that is not known here returns its values to the host (``cpu``), which is slower and never wrong.
    """
    return None if provider.name in _HOST else _DEVICES.get(provider.name, "cpu")


def _check(provider: Provider) -> None:
    import onnxruntime

    if provider.name in _PLUGINS:
        _plugin(provider.name)
        if not any(d.ep_name == provider.name for d in onnxruntime.get_ep_devices()):
            raise UsageError(f"{provider.name} finds no device on this machine")
        return
    found = onnxruntime.get_available_providers()
    if provider.name not in found:
        raise UsageError(
            f"this onnxruntime has no {provider.name}",
            hint=f"it has {', '.join(found)}; plug-ins are webgpu and qnn",
        )


@cache
def _plugin(name: str) -> Any:
    """Register the library of a plug-in, once in this process, and return its module."""
    import onnxruntime

    module_name, extra = _PLUGINS[name]
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise UsageError(
            f"{name} needs the package {module_name.replace('_', '-')}, which is not installed",
            hint=f"pip install 'flrc-edge[{extra}]'",
        ) from error
    if not hasattr(onnxruntime, "register_execution_provider_library"):
        raise UsageError(
            f"onnxruntime {onnxruntime.__version__} takes no plug-ins",
            hint="pip install --upgrade onnxruntime",
        )
    if any(d.ep_name == name for d in onnxruntime.get_ep_devices()):
        return module  # somebody else registered it
    try:
        onnxruntime.register_execution_provider_library(name, module.get_library_path())
    except Exception as error:  # onnxruntime's errors share no base of their own
        package, reason = module_name.replace("_", "-"), str(error).split("\n")[0][:200]
        raise UsageError(
            f"{name} of {package} does not load in onnxruntime {onnxruntime.__version__}: {reason}",
            hint=f"pip install --upgrade onnxruntime 'flrc-edge[{extra}]'",
        ) from error
    return module
