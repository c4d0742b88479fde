"""Take single files out of Debian packages of suites that this machine does not use, leaving its sources alone."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


def unpacked(package: str, suites: Sequence[str], scratch: Path) -> Path:
    """Return a folder with what a package of the first suite that has it holds.

    Signatures are not asked for: what is taken out is pinned by its hash.

    Raises:
        SystemExit: No suite has it, or this is no Debian.
    """
    for number, suite in enumerate(suites):
        place = scratch / f"{package}-{number}"
        (place / "lists" / "partial").mkdir(parents=True)
        (place / "archives" / "partial").mkdir(parents=True)
        sources = "".join(f"deb [trusted=yes] {mirror} {suite} main\n" for mirror in _mirrors())
        (place / "sources.list").write_text(sources)
        options = {
            "Dir::Etc::sourcelist": place / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": place / "lists",
            "Dir::Cache": place,
            "Acquire::Languages": "none",
            "Acquire::Check-Valid-Until": "false",
            "APT::Sandbox::User": "root",
        }
        apt = ["apt-get", "-q", *(part for k, v in options.items() for part in ("-o", f"{k}={v}"))]
        try:
            for command in (["update"], ["download", package]):
                subprocess.run([*apt, *command], cwd=place, check=True, capture_output=True)
            found = next(place.glob("*.deb"))
            subprocess.run(["dpkg", "-x", str(found), str(place / "root")], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError, StopIteration):
            continue
        return place / "root"
    sys.exit(f"the Debian package {package} could not be downloaded from {' or '.join(suites)}")


def _mirrors() -> Iterator[str]:
    """Yield the addresses that this machine takes Debian's packages from."""
    seen = set()
    for file in (Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))):
        if file.is_file():
            text = re.sub(r"(?m)^\s*#.*", "", file.read_text())
            for address in re.findall(r"(?:https?|mirror\+file|file):\S+/debian/?(?=\s)", text):
                if address not in seen:
                    seen.add(address)
                    yield address
