"""Checkpoints and bundles in a hub's repository: pushed in one commit, pulled at one commit and checked.

Only the model card and what ``flrc.json`` lists go either way, so nothing else that lies in a folder is published, and
nothing else that a repository holds is downloaded.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flrc_runtime import manifest
from flrc_runtime.cache import cache_folder
from flrc_runtime.errors import FlrcError, FormatError, UsageError, VerificationError
from flrc_runtime.files import MAX_JSON_BYTES, resolve_inside
from flrc_runtime.output_folder import check_output_folder, published_folder

from .cache import locked
from .hub import download_errors, upload_errors

Progress = Callable[[str, int], None]  # the name of the file that comes next, its size in bytes
_REPOSITORY = re.compile(r"[A-Za-z0-9_.-]{1,96}/[A-Za-z0-9_.-]{1,96}\Z")


@dataclass(frozen=True)
class Listing:
    """What goes over the network.

    Args:
        repository: ``owner/name``.
        folder: Where the files lie; None if they are on the hub.
        kind: ``checkpoint`` or ``bundle``.
        files: Size in bytes of every file.
        commit: The one they are of; empty before there is one.
    """

    repository: str
    folder: Path | None
    kind: str
    files: dict[str, int]
    commit: str = ""

    @property
    def bytes(self) -> int:
        """Size of all files in bytes."""
        return sum(self.files.values())


def local_listing(folder: Path, repository: str) -> Listing:
    """Return what :func:`push` uploads, after comparing every file with its checksum.

    Raises:
        FormatError: ``folder`` is not a checkpoint or bundle.
        VerificationError: A file differs from what ``flrc.json`` says, or is not listed.
        UsageError: ``repository`` is not owner/name.
    """
    check_repository(repository)
    content = manifest.verify(folder)
    files = {name: info.size for name, info in content.files.items()}
    for name in (manifest.CARD, manifest.FILE_NAME):
        if (folder / name).exists():
            files[name] = resolve_inside(folder, name).stat().st_size
    return Listing(repository, folder, content.kind, files)


def push(
    listing: Listing, *, private: bool = False, revision: str | None = None, message: str | None = None
) -> str:
    """Upload a checkpoint or bundle in one commit; the repository and the branch are made if missing.

    Files of an earlier push that are not part of this one stay in the repository; a pull passes over them.

    Args:
        listing: Of :func:`local_listing`.
        private: A repository that is made now is private.
        revision: Branch; None for the main one.
        message: Of the commit.

    Returns:
        The address of the commit.

    Raises:
        FlrcError: The hub cannot be reached or does not let this user write.
    """
    from huggingface_hub import HfApi

    if listing.folder is None:
        raise ValueError("the files of this listing are on the hub")
    api = HfApi()
    with upload_errors(listing.repository):
        api.create_repo(listing.repository, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(listing.repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=listing.repository,
            folder_path=listing.folder,
            revision=revision,
            commit_message=message or f"A {listing.kind} of flrc-edge",
            allow_patterns=list(listing.files),
        )
    return str(commit.commit_url)


def remote_listing(repository: str, *, revision: str | None = None) -> Listing:
    """Return what :func:`pull` downloads; fetches ``flrc.json`` alone.

    Raises:
        UsageError: ``repository`` is not owner/name.
        FormatError: The repository holds no checkpoint or bundle that this version reads.
        VerificationError: A listed file is missing or has another size.
        FlrcError: The hub cannot be reached, or has no such repository or does not show it.
    """
    check_repository(repository)
    with tempfile.TemporaryDirectory() as folder:
        return _fetch_listing(repository, revision, Path(folder) / _folder_name(repository))


def pull(
    repository: str, target: Path, *, revision: str | None = None, progress: Progress | None = None
) -> Listing:
    """Download a checkpoint or bundle, check every file, and publish it as ``target`` with one rename.

    A pull that was interrupted goes on with what is already there: in a hidden folder beside ``target``.

    Args:
        repository: ``owner/name``.
        target: The folder to write; must not exist.
        revision: Branch, tag or commit; None for the main branch.
        progress: Called before each file; the hub's client draws its own bars on a terminal.

    Raises:
        UsageError: ``repository`` is not owner/name, or ``target`` exists or cannot be written.
        FormatError: See :func:`remote_listing`.
        VerificationError: A file differs from what ``flrc.json`` says.
        FlrcError: See :func:`remote_listing`; or the disk is too small.
    """
    check_repository(repository)
    check_output_folder(target)
    place = target.resolve()
    downloads = place.parent / f".{place.name}.download"
    with locked(cache_folder() / "downloads" / f"{_folder_name(repository)}.lock"):
        folder = downloads / _folder_name(repository)
        listing = _fetch_listing(repository, revision, folder)
        _check_space(place.parent, listing, folder)
        for name, size in listing.files.items():
            if progress is not None:
                progress(name, size)
            _fetch(repository, name, listing.commit, folder)
        with published_folder(target) as work:
            for name in listing.files:
                (folder / name).replace(work / name)
            try:
                manifest.verify(work)
            except VerificationError as error:
                raise VerificationError(
                    f"{repository}: {str(error).partition(': ')[2]}", hint="pull it again"
                ) from None
            finally:
                shutil.rmtree(downloads)
    return listing


def check_repository(repository: str) -> None:
    """Refuse a name that is not ``owner/name``.

    Raises:
        UsageError: It is not.
    """
    if not _REPOSITORY.match(repository):
        raise UsageError(
            f"{repository!r} is not a repository's name",
            hint="that is owner/name, for instance my-name/smollm2-low-rank",
        )


def _fetch_listing(repository: str, revision: str | None, folder: Path) -> Listing:
    """Fetch ``flrc.json`` into ``folder`` and compare what it lists with what the repository holds."""
    from huggingface_hub import HfApi

    with download_errors(repository):
        found = HfApi().model_info(repository, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size for file in found.siblings or []}
    own = sizes.get(manifest.FILE_NAME)
    if own is None:
        raise FormatError(
            f"{repository} holds no {manifest.FILE_NAME}, so it is no checkpoint or bundle of flrc-edge",
            hint=f"a Hugging Face model is compressed as it is: flrc-edge compress {repository}",
        )
    if own > MAX_JSON_BYTES:
        raise FormatError(f"{repository}: {manifest.FILE_NAME} is {own} bytes, more than {MAX_JSON_BYTES}")
    commit = str(found.sha)
    _fetch(repository, manifest.FILE_NAME, commit, folder)
    content = manifest.parse(folder)
    files = {name: info.size for name, info in content.files.items()}
    for name, size in files.items():
        if sizes.get(name) != size:
            there = "is missing" if name not in sizes else f"has {sizes[name]} bytes, {size} were written"
            raise VerificationError(f"{repository}: {name} {there}", hint="push the folder again")
    card = sizes.get(manifest.CARD)
    if card is not None and card <= MAX_JSON_BYTES:
        files[manifest.CARD] = card
    return Listing(repository, None, content.kind, {**files, manifest.FILE_NAME: own}, commit)


def _fetch(repository: str, name: str, commit: str, folder: Path) -> None:
    from huggingface_hub import hf_hub_download

    with download_errors(repository):
        hf_hub_download(repository, name, revision=commit, local_dir=folder)


def _folder_name(repository: str) -> str:
    return repository.replace("/", "--")


def _check_space(parent: Path, listing: Listing, folder: Path) -> None:
    have = sum((folder / name).stat().st_size for name in listing.files if (folder / name).is_file())
    free = shutil.disk_usage(parent).free
    if free < listing.bytes - have:
        raise FlrcError(
            f"{listing.repository} needs {(listing.bytes - have) / 1e6:,.0f} MB, "
            f"{parent} has {free / 1e6:,.0f} MB free",
            hint="free some space or choose another folder with -o",
        )
