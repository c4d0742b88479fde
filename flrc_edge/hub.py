"""The hub: a model's configuration first, and only if that is supported its weights (safetensors only)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flrc_runtime.errors import FlrcError

from .hf_config import read_config

# Named one by one: a repository may also hold pickles, other frameworks' weights or a second copy.
_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
]


def fetch_config(hub_id: str) -> dict[str, Any]:
    """Download ``config.json`` (and ``generation_config.json``) alone and return it normalized.

    Raises:
        FlrcError: The hub cannot be reached, or has no such model or does not show it.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(hub_id):
        folder = snapshot_download(hub_id, allow_patterns=["config.json", "generation_config.json"])
    return read_config(Path(folder))


def fetch_model(hub_id: str) -> Path:
    """Download weights and tokenizer (resumed by the hub's client) and return the folder.

    Raises:
        FlrcError: See :func:`fetch_config`.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(hub_id):
        return Path(snapshot_download(hub_id, allow_patterns=_FILES))


@contextmanager
def _hub_errors(hub_id: str) -> Iterator[None]:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise FlrcError(
            f"{hub_id} is gated: its licence must be accepted first",
            hint="accept it on the model's page, then run `hf auth login`",
        ) from None
    except RepositoryNotFoundError:
        raise FlrcError(
            f"the hub has no model {hub_id}", hint="check the name; a private model needs `hf auth login`"
        ) from None
    except HFValidationError:
        raise FlrcError(f"{hub_id!r} is not a hub id", hint="a hub id is owner/name") from None
    except OfflineModeIsEnabled:
        raise FlrcError(
            f"{hub_id} is not in the local cache and HF_HUB_OFFLINE is set",
            hint="unset it or give a local folder",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise FlrcError(
            f"{hub_id} could not be downloaded: {first}",
            hint="check the network, or give a local folder or GGUF file",
        ) from None
