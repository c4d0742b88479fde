"""What tests need is got where it can be; what cannot be run is a line, never an error."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests import needs
from tests.needs import Need


@pytest.fixture(autouse=True)
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


@pytest.fixture
def apt(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What apt-get was asked, by root; ``gone`` is in no suite."""
    asked = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command[2:])
        gone = "gone" in command
        return subprocess.CompletedProcess(command, 100 * gone, "", "E: Unable to locate gone\n" * gone)

    monkeypatch.setattr(needs, "run", run)
    monkeypatch.setattr(
        "shutil.which", lambda name: f"/usr/bin/{name}" if name in ("apt-get", "sh") else None
    )
    monkeypatch.setattr("os.geteuid", lambda: 0)
    return asked


def no_network() -> None:
    raise SystemExit("it could not be downloaded: no network")


def test_what_is_there_is_fetched_for_and_what_is_missing_is_named() -> None:
    fetched: list[str] = []
    all_needs = [
        Need("the one", {"sh": "dash"}, lambda: fetched.append("one")),
        Need("the other", {"no-program": "its-package", "/no/file": "a b"}, lambda: fetched.append("other")),
        Need("the third", {}, no_network),
    ]
    assert needs.get(all_needs, install=False) == [
        "the other: no-program, /no/file are missing (apt-get install its-package a b)",
        "the third: it could not be downloaded: no network",
    ]
    assert fetched == ["one"]


def test_a_package_that_is_not_to_be_had_takes_no_other_with_it(apt: list[list[str]]) -> None:
    all_needs = [Need("the one", {"no-program": "gone"}), Need("the other", {"another": "its-package"})]
    first, second = needs.get([*all_needs, Need("the third", {"sh": "dash"})], install=True)
    assert first == "the one: no-program is missing (apt-get install: E: Unable to locate gone)"
    assert second.startswith("the other: another is missing")  # apt-get is not a real one here
    assert [command[0] for command in apt] == ["update", "install", "install"]
    assert apt[2][-1] == "its-package"


def test_installing_is_for_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    (line,) = needs.get([Need("the one", {"no-program": "its-package"})], install=True)
    assert line == "the one: no-program is missing (--install needs apt-get, and to be root)"


def test_elsewhere_nothing_is_got(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert needs.get([Need("the one", {}, no_network)], install=True) == [
        "the one: it runs on Linux on x86-64"
    ]


def test_every_need_of_this_project_has_packages() -> None:
    assert all(need.tests and all(need.programs.values()) for need in needs.NEEDS)
