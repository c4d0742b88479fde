"""Ten thousand requests of good, bad, slow and vanishing clients: every one is answered, and nothing grows."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flrc_runtime import load
from tests.runtime.test_server import PROMPT, Served, chat, request, solo

REQUESTS, WARM_UP, CLIENTS = 10_000, 2_000, 16
ROUTE = "/v1/chat/completions"
Client = Callable[[Served, random.Random], None]


def body(**fields: object) -> bytes:
    return json.dumps(chat(**fields)).encode()  # type: ignore[arg-type]


def refused(status: int, data: bytes) -> Client:
    def ask(served: Served, _: random.Random) -> None:
        found, _headers, answer = served.send(data)
        assert found == status, answer
        assert "error" in json.loads(answer)

    return ask


def vanishes(served: Served, rng: random.Random) -> None:
    """Goes away after some of the request was sent, or some of the answer was read."""
    data = request("POST", ROUTE, body(stream=rng.random() < 0.5, max_tokens=40))
    with served.connected() as connection:
        if rng.random() < 0.3:
            connection.sendall(data[: rng.randrange(1, len(data))])
        else:
            connection.sendall(data)
            connection.settimeout(20)
            if rng.random() < 0.7:
                connection.recv(rng.choice((1, 200, 2000)))


def dawdles(served: Served, rng: random.Random) -> None:
    """Sends its request in pieces and reads its answer byte by byte for a while."""
    data = request("POST", ROUTE, body(stream=True))
    cut = rng.randrange(1, len(data))
    with served.connected() as connection:
        connection.settimeout(20)
        connection.sendall(data[:cut])
        connection.sendall(data[cut:])
        read = b"".join(connection.recv(1) for _ in range(50))
        while part := connection.recv(512):
            read += part
    assert read.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in read


@pytest.mark.full
def test_ten_thousand_requests(talking: Path) -> None:
    expected = solo(load(talking, threads=1), PROMPT)

    def answered(served: Served, rng: random.Random) -> None:
        status, _, answer = served.send(request("POST", ROUTE, body()))
        assert status == 200
        assert json.loads(answer)["choices"][0]["message"]["content"] == expected

    kinds: dict[str, Client] = {
        "good": answered,
        "vanishes": vanishes,
        "dawdles": dawdles,
        "no JSON": refused(400, request("POST", ROUTE, b"{")),
        "wrong type": refused(400, request("POST", ROUTE, body(max_tokens="many"))),
        "unknown field": refused(400, request("POST", ROUTE, body(surprise=1))),
        "unknown model": refused(404, request("POST", ROUTE, body(model="another"))),
        "unknown route": refused(404, request("GET", "/v2/models")),
        "too long": refused(400, request("POST", ROUTE, body(text="once " * 2000))),
        "another host": refused(421, request("GET", "/v1/models", host="evil.example")),
    }
    served = Served(talking)
    counts: Counter[str] = Counter()

    def ask(number: int) -> str:
        rng = random.Random(number)
        kind = rng.choices(list(kinds), weights=[4, 2, 1, *[1] * 7])[0]
        kinds[kind](served, rng)
        return kind

    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            counts.update(pool.map(ask, range(WARM_UP)))
            served.wait(served.idle)
            before = served.memory()
            counts.update(pool.map(ask, range(WARM_UP, REQUESTS)))
        served.wait(served.idle)
        after = served.memory()
        print(dict(counts), f"{before / 1e6:.1f} -> {after / 1e6:.1f} MB")
        assert sum(counts.values()) == REQUESTS
        assert after <= 1.05 * before
        answered(served, random.Random())
    finally:
        served.close()
