"""A real server in a process of its own, with the real openai client and with bare sockets."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from flrc_runtime import FixedStage, Sampling, load, manifest
from flrc_runtime.engine import Model

PROMPT = "Once upon a time"
# The whole program, but that stories260k would have said everything before a client could go away.
SLOW = """
import sys, time
from flrc_runtime import engine
decode = engine.decode
def slow(*arguments):
    for token in decode(*arguments):
        time.sleep(0.05)
        yield token
engine.decode = slow
from flrc_edge.cli import main
main()
"""
# Every answer fails after its third token: in the runtime's own way, or, with another seed, as a bug would.
FAILING = """
from flrc_runtime import NumericalError, engine
decode = engine.decode
def failing(model, decoder, request):
    for number, token in enumerate(decode(model, decoder, request)):
        if number == 3:
            raise (RuntimeError if request.sampling.seed else NumericalError)("the words of the fault")
        yield token
engine.decode = failing
from flrc_edge.cli import main
main()
"""
# As libraries do that walk deep trees.
RAISED = """
import sys
sys.setrecursionlimit(100_000)
from flrc_edge.cli import main
main()
"""


class Served:
    """A server process, of the program or of one that changes it and runs it."""

    def __init__(self, folder: Path, *options: object, program: str | None = None) -> None:
        start = ["-m", "flrc_edge"] if program is None else ["-c", program]
        self.process = subprocess.Popen(
            [sys.executable, *start, "serve", folder, "--port", "0", "--threads", "1", *map(str, options)],
            stderr=subprocess.PIPE, text=True,
            # a job in the background would ignore Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        assert self.process.stderr is not None
        said, found = "", None
        while found is None:  # its weights may be packed first
            line = self.process.stderr.readline()
            assert line, said
            said += line
            found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)
        self.port = int(found[1])

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            max_retries=0,
            timeout=60,
            **{"api_key": "none"} | options,
        )

    def send(self, data: bytes, *, seconds: float = 20) -> tuple[int, dict[str, str], bytes]:
        """Send bytes and read until the server closes."""
        with self.connected() as connection:
            connection.settimeout(seconds)
            connection.sendall(data)
            return read(connection)

    @contextmanager
    def connected(self) -> Iterator[socket.socket]:
        with closing(socket.create_connection(("127.0.0.1", self.port), timeout=20)) as connection:
            yield connection

    def post(
        self, path: str, body: object, *, headers: str = "", kind: str = "application/json"
    ) -> tuple[int, dict[str, str], Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, found, answer = self.send(request("POST", path, data, headers=headers, kind=kind))
        return status, found, json.loads(answer)

    def get(self, path: str) -> tuple[int, bytes]:
        status, _, answer = self.send(request("GET", path))
        return status, answer

    def metric(self, name: str) -> float:
        lines = self.get("/metrics")[1].decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}(\{{| )", line))

    def wait(self, holds: Callable[[], bool], seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end
            time.sleep(0.02)

    def idle(self) -> bool:
        return json.loads(self.get("/health")[1]) == {"status": "ok", "active": 0, "waiting": 0}

    def memory(self) -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", text)[1])  # type: ignore[index]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


def request(
    method: str,
    path: str,
    data: bytes = b"",
    *,
    headers: str = "",
    kind: str = "application/json",
    host: str = "127.0.0.1",
) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n{headers}"
    if method == "POST":
        head += f"content-type: {kind}\r\ncontent-length: {len(data)}\r\n"
    return head.encode() + b"\r\n" + data


def read(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    data = b""
    while part := connection.recv(65536):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


def chat(text: str = PROMPT, **fields: Any) -> dict[str, Any]:
    return {
        "model": "stories260k",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 12,
    } | fields


@pytest.fixture(scope="module")
def served(talking: Path) -> Iterator[Served]:
    found = Served(talking)
    yield found
    found.close()


@pytest.fixture(scope="module")
def slow(talking: Path) -> Iterator[Served]:
    """Two places, a line of two, and 50 ms a token."""
    found = Served(talking, "--parallel", 2, "--queue", 2, program=SLOW)
    yield found
    found.close()


@pytest.fixture(scope="module")
def alone(talking: Path) -> Model:
    return load(talking, threads=1)


def solo(model: Model, text: str, **options: Any) -> str:
    return "".join(
        t.text for t in model.stream([{"role": "user", "content": text}], max_tokens=12, **options)
    )


def test_the_openai_client_gets_what_the_runtime_says(served: Served, alone: Model) -> None:
    client = served.client()
    assert [m.id for m in client.models.list()] == ["stories260k"]
    assert client.models.retrieve("stories260k").id == "stories260k"
    whole = client.chat.completions.create(**chat())
    choice = whole.choices[0]
    assert choice.message.content == solo(alone, PROMPT) and choice.finish_reason == "length"
    assert choice.stages == [0] * 8 + [1] * 4  # type: ignore[attr-defined]
    assert whole.usage is not None and whole.usage.completion_tokens == 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    chunks = list(client.chat.completions.create(**chat(stream=True, stream_options={"include_usage": True})))
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == choice.message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage and len({c.id for c in chunks}) == 1
    drawn = client.chat.completions.create(
        **chat(temperature=1.0, seed=7, top_p=0.9, extra_body={"stage": 1, "top_k": 50})
    )
    sampling = Sampling(temperature=1.0, top_p=0.9, top_k=50, seed=7)
    assert drawn.choices[0].message.content == solo(alone, PROMPT, sampling=sampling, policy=FixedStage(1))
    stopped = client.chat.completions.create(**chat(stop=[","], max_tokens=200))
    assert stopped.choices[0].finish_reason == "stop" and "," not in (
        stopped.choices[0].message.content or ""
    )


def test_completions(served: Served, alone: Model) -> None:
    client = served.client()
    expected = "".join(t.text for t in alone.stream(PROMPT, max_tokens=12, chat=False))
    for prompt in (PROMPT, alone.tokenizer.encode(PROMPT)):
        done = client.completions.create(model="stories260k", prompt=prompt, max_tokens=12)
        assert done.choices[0].text == expected
    pieces = client.completions.create(model="stories260k", prompt=PROMPT, max_tokens=12, stream=True)
    assert "".join(p.choices[0].text for p in pieces) == expected


def test_a_request_that_names_no_model_gets_the_only_one(served: Served) -> None:
    for path, body in (
        ("/v1/chat/completions", chat()),
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 3}),
    ):
        body.pop("model", None)
        status, _, answer = served.post(path, body)
        assert (status, answer["model"]) == (200, "stories260k")


def test_a_huge_prompt_holds_up_nobody(served: Served) -> None:
    """It is refused for what it is; what may fit is read beside other requests (tests/runtime/test_tokenizer.py)."""
    long = "once upon " * 390_000
    bodies = (
        ("/v1/completions", {"prompt": long}),
        ("/v1/completions", {"prompt": [403] * 800_000}),
        ("/v1/chat/completions", chat(long)),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "once"}] * 80_000}),
    )
    with ThreadPoolExecutor(2) as threads:
        for path, body in bodies:
            asked = threads.submit(served.post, path, body)
            while not asked.done():
                assert json.loads(served.get("/health")[1])["status"] == "ok"
            status, _, answer = asked.result()
            assert status in (400, 500), answer  # the template may have taken too many steps
            assert "leaves no room" in answer["error"]["message"] or "template" in answer["error"]["message"]


def test_tokens_of_log_probabilities_put_together_are_the_text(served: Served, alone: Model) -> None:
    for prompt in (PROMPT, alone.tokenizer.encode("Lily liked 日")[:-1]):  # the second ends amid a character
        body = {"prompt": prompt, "max_tokens": 8, "logprobs": 20, "temperature": 1.5, "seed": 3}
        status, _, answer = served.post("/v1/completions", body)
        assert status == 200
        found = answer["choices"][0]["logprobs"]
        assert all(len(top) == 20 for top in found["top_logprobs"])  # none lost to one of the same text
    status, _, answer = served.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 8, "logprobs": 0})
    choice = answer["choices"][0]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"] and choice["text"].startswith(",")
    spoken = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8, "logprobs": True}
    status, _, answer = served.post("/v1/chat/completions", spoken)
    content = answer["choices"][0]["logprobs"]["content"]
    data = b"".join(bytes(c["bytes"]) for c in content)
    assert data.decode().removeprefix(" ") == answer["choices"][0]["message"]["content"]


def test_log_probabilities(served: Served, alone: Model) -> None:
    import numpy as np

    done = served.client().completions.create(model="stories260k", prompt=PROMPT, max_tokens=5, logprobs=3)
    tokens = list(alone.stream(PROMPT, max_tokens=5, chat=False))
    prompt = alone.tokenizer.encode(PROMPT)
    logits = alone.logits([*prompt, *(t.token_id for t in tokens)])[len(prompt) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    found = done.choices[0].logprobs
    assert found is not None and found.token_logprobs is not None and found.top_logprobs is not None
    for i, token in enumerate(tokens):
        assert found.token_logprobs[i] == pytest.approx(expected[i, token.token_id], abs=1e-4)
        assert sorted(found.top_logprobs[i].values())[-1] == pytest.approx(expected[i].max(), abs=1e-4)
    named = served.client().chat.completions.create(**chat(logprobs=True, top_logprobs=2, max_tokens=3))
    content = named.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None and len(content) == 3 and all(len(c.top_logprobs) == 2 for c in content)
    assert all(
        c.logprob == c.top_logprobs[0].logprob and bytes(c.bytes or []).decode() == c.token for c in content
    )


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/chat/completions", b"{", 400, "invalid_json"),
        ("/v1/chat/completions", b"\xff", 400, "invalid_json"),
        ("/v1/chat/completions", chat(colour="red"), 400, None),
        ("/v1/chat/completions", chat(temperature="hot"), 400, None),
        ("/v1/chat/completions", chat(stage=9), 400, None),
        ("/v1/chat/completions", chat(model="gpt-4o"), 404, "model_not_found"),
        ("/v1/chat/completions", chat("word " * 600), 400, "context_length_exceeded"),
        ("/v1/completions", {"model": "stories260k", "prompt": [9999]}, 400, None),
        ("/v1/completions", {"model": "stories260k", "prompt": ""}, 400, None),
        ("/v1/nothing", {}, 404, None),
        ("/health", {}, 405, None),
    ],
)
def test_mistakes_have_the_shape_of_openai(
    served: Served, path: str, body: object, status: int, code: str | None
) -> None:
    found, headers, answer = served.post(path, body)
    assert found == status and set(answer) == {"error"} and "server" not in headers
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error" and answer["error"]["code"] == code
    assert answer["error"]["message"] and served.idle()


@pytest.mark.parametrize(
    "template",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    ],
)
def test_a_hostile_template_does_not_end_the_server(talking: Path, tmp_path: Path, template: str) -> None:
    folder = Path(shutil.copytree(talking, tmp_path / "stories260k"))
    described = manifest.read(folder)
    (folder / "chat_template.jinja").write_text(template)
    manifest.seal(folder, described)
    served = Served(folder, program=RAISED)
    try:
        for _ in range(3):
            status, _, answer = served.post("/v1/chat/completions", chat())
            assert status == 500 and answer["error"]["type"] == "server_error"
            assert answer["error"]["message"].startswith("the chat template ")
        assert (
            served.post("/v1/completions", {"model": "stories260k", "prompt": PROMPT, "max_tokens": 2})[0]
            == 200
        )
        assert served.idle()
    finally:
        served.close()


def test_the_client_raises_its_own_errors(served: Served) -> None:
    client = served.client()
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**chat("word " * 600))
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_bodies_that_are_no_json_or_too_large(served: Served) -> None:
    assert served.post("/v1/completions", chat(), kind="text/plain")[0] == 415
    head = request("POST", "/v1/completions")
    status, _, answer = served.send(head.replace(b"content-length: 0", b"content-length: 99999999"))
    assert status == 413 and b"larger than 4194304 bytes" in answer
    chunk = b"40000\r\n" + b" " * 0x40000 + b"\r\n"
    with served.connected() as connection:  # that does not say how much comes
        connection.sendall(head.replace(b"content-length: 0", b"transfer-encoding: chunked") + 16 * chunk)
        connection.sendall(b"1\r\n \r\n")
        assert read(connection)[0] == 413
    assert served.idle()


def test_32_clients_and_flat_memory(served: Served, alone: Model) -> None:
    """Every answer is complete and equal to its solo run, and 200 requests later nothing has grown."""
    texts = [
        f"{PROMPT} there was a {kind}" for kind in ("cat", "dog", "bird", "boy", "girl", "tree", "car", "sun")
    ]
    expected = {text: solo(alone, text) for text in texts}

    def ask(i: int) -> None:
        text = texts[i % len(texts)]
        client = served.client()
        if i % 2:
            stream = client.chat.completions.create(**chat(text, stream=True))
            answer = "".join(c.choices[0].delta.content or "" for c in stream)
        else:
            answer = client.chat.completions.create(**chat(text)).choices[0].message.content or ""
        assert answer == expected[text]

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(ask, range(64)))
        before = served.memory()
        list(pool.map(ask, range(200)))
    served.wait(served.idle)
    assert served.memory() < before + 8_000_000
    assert served.metric("flrc_requests_total") >= 264 and served.metric("flrc_abandoned_answers_total") == 0


def test_a_client_that_goes_away_ends_its_answer(slow: Served) -> None:
    client = slow.client()
    for stream in (True, False):
        before, abandoned = (
            slow.metric("flrc_generated_tokens_total"),
            slow.metric("flrc_abandoned_answers_total"),
        )
        data = request(
            "POST", "/v1/chat/completions", json.dumps(chat(stream=stream, max_tokens=400)).encode()
        )
        with slow.connected() as connection:
            connection.sendall(data)
            slow.wait(lambda before=before: slow.metric("flrc_generated_tokens_total") >= before + 3)  # type: ignore[misc]
        begun = time.monotonic()
        answer = client.chat.completions.create(**chat(max_tokens=2))
        assert answer.usage is not None and time.monotonic() - begun < 10  # not the 20 s of the first
        slow.wait(slow.idle)
        assert slow.metric("flrc_generated_tokens_total") < before + 60
        assert slow.metric("flrc_abandoned_answers_total") == abandoned + 1


def test_the_openai_client_is_cut_off(slow: Served) -> None:
    client = slow.client()
    stream = client.chat.completions.create(**chat(stream=True, max_tokens=400))
    for _, _ in zip(range(3), stream, strict=False):
        pass
    stream.close()
    assert client.chat.completions.create(**chat(max_tokens=2)).choices[0].message.content is not None
    slow.wait(slow.idle)


def test_a_full_line_says_when_to_come_back(slow: Served) -> None:
    data = request("POST", "/v1/chat/completions", json.dumps(chat(stream=True, max_tokens=400)).encode())
    connections = [socket.create_connection(("127.0.0.1", slow.port)) for _ in range(4)]
    try:
        for i, connection in enumerate(connections):
            connection.sendall(data)
            slow.wait(
                lambda i=i: sum(json.loads(slow.get("/health")[1])[k] for k in ("active", "waiting")) == i + 1
            )  # type: ignore[misc]
        status, headers, answer = slow.post("/v1/chat/completions", chat())
        assert (status, headers["retry-after"], answer["error"]["type"]) == (429, "1", "rate_limit_error")
        connections.pop().close()  # one of those that wait
        slow.wait(lambda: json.loads(slow.get("/health")[1])["waiting"] == 1)
    finally:
        for connection in connections:
            connection.close()
    slow.wait(slow.idle)


@pytest.mark.parametrize(
    ("seed", "said"), [(0, "the words of the fault"), (1, "the server failed; its log says why")]
)
def test_a_failure_inside_a_stream_ends_it(talking: Path, seed: int, said: str) -> None:
    """The status is sent already: the client gets the error as its last event, and no [DONE]."""
    failing = Served(talking, program=FAILING)
    try:
        body = chat(stream=True, seed=seed, temperature=0.5)
        status, _, answer = failing.send(request("POST", "/v1/chat/completions", json.dumps(body).encode()))
        events = [json.loads(e) for e in re.findall(r"data: (\{.*\})", answer.decode())]
        assert status == 200 and "error" not in events[0] and b"[DONE]" not in answer
        assert events[-1]["error"] == {"message": said, "type": "server_error", "param": None, "code": None}
        with pytest.raises(openai.APIError, match=said):
            list(failing.client().chat.completions.create(**body))
        failing.wait(failing.idle)
        status, _, found = failing.post("/v1/chat/completions", chat(seed=seed, temperature=0.5))
        assert (status, found["error"]["message"]) == (500, said)
        failing.wait(failing.idle)
    finally:
        failing.close()


def test_what_clients_say_is_not_logged(talking: Path) -> None:
    """Neither words of a request nor line breaks in its path reach the log."""
    served = Served(talking)
    try:
        served.post("/v1/chat/completions", chat("a secret word"))
        served.post("/v1/chat/completions", chat("a secret word", top_p="a secret word"))
        served.send(request("GET", "/a%0asecret%0dword"))
        served.process.send_signal(signal.SIGTERM)
        assert served.process.stderr is not None
        log = served.process.stderr.read()
    finally:
        served.close()
    assert "secret" not in log and "word" not in log


def test_answers_take_turns(slow: Served) -> None:
    """Two answers at a time, so the second does not wait for the end of the first."""

    def ask(_: int) -> tuple[float, float]:
        stream = slow.client().chat.completions.create(**chat(stream=True, max_tokens=20))
        times = [time.monotonic() for _ in stream]
        return times[0], times[-1]

    with ThreadPoolExecutor(2) as pool:
        (begun_a, ended_a), (begun_b, ended_b) = pool.map(ask, range(2))
    assert max(begun_a, begun_b) < min(ended_a, ended_b)


def test_a_body_that_takes_too_long(alone: Model) -> None:
    import threading

    import uvicorn

    from flrc_runtime.server.app import Limits, Server

    config = uvicorn.Config(Server(alone, limits=Limits(body_seconds=0.3)).app(), port=0, log_config=None)
    server, listener = uvicorn.Server(config), config.bind_socket()
    listener.listen()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with closing(socket.create_connection(listener.getsockname(), timeout=20)) as connection:
            connection.sendall(request("POST", "/v1/completions", b"x" * 9)[:-5])
            status, _, answer = read(connection)
        assert status == 408 and b"took too long" in answer
    finally:
        server.should_exit = True
        thread.join()


def test_slow_clients(served: Served) -> None:
    with served.connected() as connection:
        connection.settimeout(20)
        connection.sendall(b"POST /v1/comp")  # and nothing more
        assert connection.recv(100) == b""  # closed after ten seconds
    assert served.idle()


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "[::2]:1", "x"]
)
def test_a_page_that_rebinds_its_name_is_refused(served: Served, host: str) -> None:
    data = json.dumps(chat()).encode()
    for asked in (
        request("POST", "/v1/chat/completions", data, host=host),
        request("GET", "/metrics", host=host),
    ):
        status, _, answer = served.send(asked)
        assert status == 421
        assert json.loads(answer)["error"]["code"] == "wrong_host"


@pytest.mark.parametrize("host", ["localhost:8080", "LOCALHOST", "127.0.0.1", "[::1]:8080", "[::1]"])
def test_this_machine_s_own_names_are_served(served: Served, host: str) -> None:
    assert served.send(request("GET", "/v1/models", host=host))[0] == 200


def test_the_key(talking: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a-secret-key\n")
    served = Served(talking, "--api-key-file", tmp_path / "key")
    try:
        assert served.client(api_key="a-secret-key").models.list().data[0].id == "stories260k"
        for key in ("wrong-key", "a-secret-ke", "ключ"):
            headers = f"authorization: Bearer {key}\r\n"
            status, _, answer = served.post("/v1/chat/completions", chat(), headers=headers)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        assert served.post("/v1/chat/completions", b"{")[0] == 401  # before anything is read
        assert served.get("/metrics")[0] == 401 and served.get("/health")[0] == 200
        assert served.send(request("GET", "/health", host="a.name"))[0] == 200  # behind a proxy, with a key
    finally:
        served.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_let_answers_end(talking: Path, number: int, code: int) -> None:
    served = Served(talking, program=SLOW)
    try:
        with served.connected() as connection:
            connection.settimeout(30)
            data = json.dumps(chat(stream=True, max_tokens=20)).encode()
            connection.sendall(request("POST", "/v1/chat/completions", data))
            first = connection.recv(4096)
            served.process.send_signal(number)
            rest = b""
            while part := connection.recv(4096):
                rest += part
        assert (first + rest).count(b"data: ") == 21 and b"[DONE]" in rest
        assert served.process.wait(timeout=20) == code
        assert served.process.stderr is not None and "Traceback" not in served.process.stderr.read()
    finally:
        served.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "0.0.0.0"), "can be reached by other machines"),
        (("--parallel", 0), "parallel must be at least 1"),
        (("--port", 99999), "port 99999 is not from 0 to 65535"),
        (("--stage", 7), "stage 7 is not one of"),
        (("--temperature", -1), "temperature -1"),
        (("--api-key-file", "nothing"), "nothing cannot be read"),
        (("--mean-keep", 0.01), "below"),
    ],
)
def test_refused(talking: Path, options: tuple[object, ...], message: str) -> None:
    from click.testing import CliRunner

    from flrc_edge.cli import group

    done = CliRunner().invoke(group, ["serve", str(talking), *map(str, options)])
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_port_that_is_taken(talking: Path, served: Served) -> None:
    command = [sys.executable, "-m", "flrc_edge", "serve", talking, "--port", str(served.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "cannot be listened on" in done.stderr and "Traceback" not in done.stderr
