"""Whether the ``genai_config.json`` of a bundle says of its model what ``flrc.json`` says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import VerificationError
from .files import read_json, resolve_inside

if TYPE_CHECKING:
    from .manifest import Manifest

GENAI_FILE = "genai_config.json"


def check_genai_file(folder: Path, manifest: Manifest) -> None:
    """Compare what both files say; this runtime reads flrc.json alone, onnxruntime-genai the other one.

    Raises:
        VerificationError: They disagree; the message names the field and both values.
    """
    config = _object(read_json(resolve_inside(folder, GENAI_FILE)))
    model = _object(config.get("model"))
    decoder = _object(model.get("decoder"))
    info = manifest.model
    pairs = {
        "vocab_size": (model.get("vocab_size"), info.vocab_size),
        "context_length": (model.get("context_length"), info.context_length),
        "hidden_size": (decoder.get("hidden_size"), info.hidden_size),
        "num_hidden_layers": (decoder.get("num_hidden_layers"), info.num_layers),
        "num_attention_heads": (decoder.get("num_attention_heads"), info.num_heads),
        "num_key_value_heads": (decoder.get("num_key_value_heads"), info.num_kv_heads),
        "head_size": (decoder.get("head_size"), info.head_dim),
    }
    for field, (found, wanted) in pairs.items():
        if found != wanted:
            raise VerificationError(
                f"{folder.name}: {GENAI_FILE} says {field} {found!r:.40}, flrc.json says {wanted}",
                hint="write the bundle again",
            )
    if decoder.get("filename") not in {stage.graph for stage in manifest.stages}:
        raise VerificationError(
            f"{folder.name}: {GENAI_FILE} names a graph that is no stage of flrc.json",
            hint="write the bundle again",
        )


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
