"""The engine behind JSON commands: what the app's page and the desktop preview talk to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import flrc_runtime
from flrc_runtime import Conversation
from tests.android.test_chat import CHATML, exported

QUESTIONS = ("Once upon a time", "And then?", "Who was it?")


@pytest.fixture(scope="module")
def chat_bundle(compressed_stories: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(compressed_stories.checkpoint, CHATML, tmp_path_factory.mktemp("chat"))


def said(events: list[dict[str, Any]]) -> str:
    return "".join(event["text"] for event in events if event["type"] == "token")


def test_turns_are_those_of_the_python_conversation(host: Any, chat_bundle: Path) -> None:
    host.send(type="open", folder=str(chat_bundle), context=400, threads=1)
    opened = host.event()
    assert (opened["type"], opened["model"], opened["chat"]) == ("opened", "stories260k", True)
    model = flrc_runtime.load(chat_bundle, context=400, threads=1)
    assert [s["keep"] for s in opened["stages"]] == [s.keep for s in model.manifest.stages]
    conversation = Conversation(model)
    for question in QUESTIONS:
        host.send(type="ask", text=question, max_tokens=24)
        events = host.until("done", "error")
        wanted = list(conversation.ask(question, max_tokens=24))
        assert said(events) == "".join(token.text for token in wanted)
        assert [e["stage"] for e in events[:-1]] == [token.stage for token in wanted]
        done = events[-1]
        assert (done["tokens"], done["reason"]) == (len(wanted), wanted[-1].finish_reason)
        assert done["reused"] == conversation.reused
        assert done["tokens_per_second"] > 0 and done["first_ms"] > 0
    host.send(type="reset", system="Be brief.")
    assert host.event() == {"type": "reset"}
    conversation.reset("Be brief.")
    host.send(type="ask", text="Why?", max_tokens=8)
    assert said(host.until("done")) == "".join(t.text for t in conversation.ask("Why?", max_tokens=8))
    host.send(type="close")
    assert host.event() == {"type": "closed"}


def test_the_stage_is_moved_and_the_answer_stopped_while_it_runs(host: Any, chat_bundle: Path) -> None:
    host.send(type="open", folder=str(chat_bundle), threads=1)
    host.until("opened")
    host.send(type="stage", stage=0)
    host.send(type="ask", text="Once upon a time", max_tokens=400, temperature=1.0, seed=1)
    events = [host.event() for _ in range(10)]
    assert {event["stage"] for event in events} == {0}
    host.send(type="stage", stage=2)
    while events[-1]["type"] == "token" and events[-1]["stage"] != 2:
        events.append(host.event())
    assert events[-1]["stage"] == 2
    host.send(type="stop")
    host.send(type="ask", text="And then?", max_tokens=4, seed=1)  # a question right behind it is not stopped
    first, second = host.until("done")[-1], host.until("done")[-1]
    assert first["reason"] in ("stopped", "stop", "length") and first["tokens"] < 400
    assert (second["reason"], second["tokens"]) in {("length", 4), ("stop", second["tokens"])}
    assert second["reused"] > 0


@pytest.mark.parametrize("resident", [1, 2, 0])
def test_few_stages_stay_open(host: Any, chat_bundle: Path, resident: int) -> None:
    answers = []
    for keep in (resident, 0):  # the answer does not depend on it
        host.send(type="open", folder=str(chat_bundle), threads=1, resident=keep)
        host.until("opened")
        host.send(type="policy", mean=0.8)
        host.event()
        host.send(type="ask", text="Once upon a time", max_tokens=80, seed=1)
        events = host.until("done")
        assert {event["stage"] for event in events[:-1]} == {0, 1, 2}
        assert events[-1]["open_stages"] == (keep or 3)
        answers.append([(event["text"], event["stage"]) for event in events[:-1]])
    assert answers[0] == answers[1]


def test_a_policy_follows_a_signal_from_outside(host: Any, chat_bundle: Path) -> None:
    host.send(type="open", folder=str(chat_bundle), threads=1)
    host.until("opened")
    host.send(type="policy", thresholds=[0.5, 0.2])
    assert host.event() == {"type": "policy"}
    for charge, stage in ((0.9, 0), (0.4, 1), (0.1, 2), (None, 0)):
        host.send(type="signal", value=charge)
        host.send(type="ask", text="Once upon a time", max_tokens=6, seed=1)
        stages = [event["stage"] for event in host.until("done")[:-1]]
        assert stages[0] == 0 and set(stages[1:]) <= {stage}, charge
    host.send(type="stage", stage=2)  # what the user chooses goes before
    host.send(type="ask", text="Once upon a time", max_tokens=6, seed=1)
    assert {event["stage"] for event in host.until("done")[1:-1]} <= {2}
    host.send(type="stage", stage=None)
    host.send(type="policy", mean=0.01)
    assert "below the share of the last stage" in host.event()["message"]
    host.send(type="policy")
    assert host.event() == {"type": "policy"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ({"type": "ask", "text": "x"}, "no bundle is open"),
        ({"type": "dance"}, "there is no command 'dance'"),
        ({"kind": "open"}, "the command.type: expected a string"),
        ({"type": "open", "folder": "/nowhere"}, "is not a folder"),
        ({"type": "open", "folder": 7}, "the command.folder: expected a string"),
        ({"type": "stage", "stage": -1}, "the command.stage: expected a whole number"),
    ],
)
def test_mistakes_are_events(host: Any, command: dict[str, Any], message: str) -> None:
    host.send(**command)
    event = host.event()
    assert event["type"] == "error" and message in event["message"]


def test_the_engine_lives_on_after_mistakes(host: Any, chat_bundle: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(chat_bundle, tmp_path / "damaged"))
    data = bytearray((damaged / "weights.bin").read_bytes())
    data[-1] ^= 1
    (damaged / "weights.bin").write_bytes(data)
    host.send(type="open", folder=str(damaged))
    assert "checksum mismatch in weights.bin" in host.event()["message"]
    host.send(type="open", folder=str(chat_bundle), context=10**6)
    assert "is not from 2 to" in host.event()["message"]
    host.send(type="open", folder=str(chat_bundle), context=200, threads=1)
    host.until("opened")
    for question, message in ((" ", "the message is empty"), ("word " * 400, "the context holds 200")):
        host.send(type="ask", text=question)
        assert message in host.event()["message"]
    host.send(type="ask", text="Why?", temperature=1000)
    assert "temperature 1000.0 is not from 0 to 100" in host.event()["message"]
    host.send(type="ask", text="Why?", max_tokens=3)
    assert host.until("done", "error")[-1]["type"] == "done"
