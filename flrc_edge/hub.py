"""A hub's client: a model's configuration first, then its weights (safetensors only); its errors as one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flrc_runtime.errors import FlrcError

from .model_folder import INDEX, SINGLE, listed_shards

# Named one by one: a repository may also hold pickles, other frameworks' weights or a second copy.
_CONFIGS = ["config.json", "generation_config.json", "adapter_config.json"]
_FILES = [
    *_CONFIGS,
    SINGLE,
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
]


def fetch_config(hub_id: str) -> Path:
    """Download the configuration alone and return the folder.

    Raises:
        FlrcError: The hub cannot be reached, or has no such model or does not show it.
    """
    from huggingface_hub import snapshot_download

    with download_errors(hub_id):
        return Path(snapshot_download(hub_id, allow_patterns=_CONFIGS))


def fetch_model(hub_id: str) -> Path:
    """Download weights and tokenizer (resumed by the hub's client) and return the folder.

    Raises:
        FlrcError: See :func:`fetch_config`.
        FormatError: The index of the shards is damaged.
    """
    from huggingface_hub import snapshot_download

    with download_errors(hub_id):
        folder = Path(snapshot_download(hub_id, allow_patterns=_FILES))
        if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
            snapshot_download(hub_id, allow_patterns=[*_FILES, *listed_shards(folder)])
    return folder


@contextmanager
def download_errors(repository: str) -> Iterator[None]:
    """Turn what the hub's client raises while it reads ``repository`` into one sentence.

    Raises:
        FlrcError: The block raised one of the client's errors or an error of the network or the disk.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        with _client_errors(repository):
            yield
    except GatedRepoError:
        raise FlrcError(
            f"{repository} is gated: its licence must be accepted first",
            hint="accept it on the model's page, then run `hf auth login`",
        ) from None
    except RepositoryNotFoundError:
        raise FlrcError(
            f"the hub has no model {repository}",
            hint="check the name; a private model needs `hf auth login`",
        ) from None
    except RevisionNotFoundError:
        raise FlrcError(
            f"{repository} has no such revision", hint="give a branch, a tag or a commit of it"
        ) from None
    except (_http_error(), OSError) as error:
        raise FlrcError(
            f"{repository} could not be downloaded: {_first_line(error)}",
            hint="check the network, or give a local folder or GGUF file",
        ) from None


@contextmanager
def upload_errors(repository: str) -> Iterator[None]:
    """Turn what the hub's client raises while it writes to ``repository`` into one sentence.

    Raises:
        FlrcError: See :func:`download_errors`.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with _client_errors(repository):
            yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403, 404):
            raise FlrcError(
                f"the hub does not let you write to {repository}",
                hint="run `hf auth login` with a token that may write, and check the owner's name",
            ) from None
        raise FlrcError(f"{repository} could not be written: {_first_line(error)}") from None
    except (
        _http_error(),
        OSError,
        RuntimeError,
    ) as error:  # of a large file, the client raises a RuntimeError
        raise FlrcError(
            f"{repository} could not be written: {_first_line(error)}", hint="check the network"
        ) from None


@contextmanager
def _client_errors(repository: str) -> Iterator[None]:
    """Those errors that reading and writing share."""
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError:
        raise FlrcError(f"{repository!r} is not a hub id", hint="a hub id is owner/name") from None
    except OfflineModeIsEnabled:
        raise FlrcError(
            f"{repository} needs the network and HF_HUB_OFFLINE is set", hint="unset it"
        ) from None


def _http_error() -> type[Exception]:
    """Return what the client's HTTP library raises; which library it is depends on the client's version."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__bases__ if base is not OSError)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
