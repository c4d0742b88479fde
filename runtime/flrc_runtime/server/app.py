"""The routes: OpenAI's ``/v1/models``, ``/v1/chat/completions`` and ``/v1/completions``, ``/health``, ``/metrics``."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..engine import Model, Token
from ..errors import FlrcError, UsageError
from ..policy import FixedStage, Policy
from .answers import Kind, Reply, event
from .errors import ApiError
from .generation import Generation
from .metrics import Metrics
from .requests import ChatRequest, CompletionRequest, chat_request, completion_request, parse_body
from .turns import FullError, Places, Turns

LONG_BODY = 65_536  # bytes from which a request is read in a thread of its own kind
OPEN_ROUTES = ("/health",)  # that need no key: what watches over a server has none
FAILED = "the server failed; its log says why"
T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one server takes on.

    Args:
        parallel: Answers that are computed at a time, token by token in turn.
        queue: Requests that may wait for one of those places; one more is told to come back.
        body_bytes: Of a request.
        body_seconds: Until a body is whole.
        max_tokens: Of an answer that names no number, and the most that one may ask for; None: the context.
    """

    parallel: int = 4
    queue: int = 64
    body_bytes: int = 4 * 1024 * 1024
    body_seconds: float = 30.0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("parallel", 1), ("queue", 0), ("body_bytes", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not self.body_seconds > 0:
            raise UsageError(f"body_seconds must be positive, not {self.body_seconds:g}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"max_tokens must be positive, not {self.max_tokens}")


class Server:
    """A bundle behind HTTP.

    Args:
        model: A loaded bundle.
        name: That clients call it by; None for the name of the model.
        limits: What it takes on.
        api_key: That clients must send; None: none.
        hosts: Names and addresses that requests may be for; None: any. A page of another name that resolves to this
            machine (DNS rebinding) is refused by them.
        policy: Makes the policy of an answer whose request names no stage; its None is the bundle's schedule.
        temperature: Of requests that name none.
    """

    def __init__(
        self,
        model: Model,
        *,
        name: str | None = None,
        limits: Limits | None = None,
        api_key: str | None = None,
        hosts: Collection[str] | None = None,
        policy: Callable[[], Policy | None] = lambda: None,
        temperature: float = 0.0,
    ) -> None:
        self._model, self.limits = model, limits or Limits()
        self.name = name or model.manifest.model.name
        self._key = None if api_key is None else api_key.encode()
        self._hosts = None if hosts is None else frozenset(h.lower() for h in hosts)
        self._policy, self._temperature = policy, temperature
        self._created = int(time.time())
        self.places = Places(self.limits.parallel, self.limits.queue)
        self.metrics = Metrics(self.places)
        self._executor = ThreadPoolExecutor(self.limits.parallel, thread_name_prefix="answer")
        # One after the other, so that any number of long prompts leaves room for short ones.
        self._long_requests = ThreadPoolExecutor(1, thread_name_prefix="long request")
        model.sessions.turns = Turns()

    def app(self) -> Starlette:
        """Return the ASGI application."""
        return Starlette(
            routes=[
                Route("/health", self._guarded(self._health)),
                Route("/metrics", self._guarded(self._metrics)),
                Route("/v1/models", self._guarded(self._models)),
                Route("/v1/models/{name:path}", self._guarded(self._one_model)),
                Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
                Route("/v1/completions", self._guarded(self._complete), methods=["POST"]),
            ],
            exception_handlers={HTTPException: self._http_error, Exception: self._failure},
        )

    def _guarded(
        self, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Ask for the key, and turn errors into answers."""

        async def guarded(request: Request) -> Response:
            route = request.scope["route"].path
            try:
                self._check_host(request)
                self._check_key(request)
                response = await handler(request)
            except ApiError as error:
                response = self._refusal(error)
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it
            except Exception:
                _log.exception("a request to %s failed", route)
                response = self._refusal(ApiError(500, FAILED))
            self.metrics.requests.labels(route, str(response.status_code)).inc()
            return response

        return guarded

    def _check_host(self, request: Request) -> None:
        host = request.headers.get("host", "").lower()
        name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
        if self._hosts is not None and name not in self._hosts:
            raise ApiError(
                421,
                f"this server answers to {', '.join(sorted(self._hosts))} alone; a key or --public lifts that",
                code="wrong_host",
            )

    def _check_key(self, request: Request) -> None:
        if self._key is None or request.url.path in OPEN_ROUTES:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key):
            raise ApiError(
                401,
                "the API key is missing or wrong",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "active": self.places.taken, "waiting": self.places.waiting})

    async def _metrics(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def _one_model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._description())

    def _description(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "flrc-edge",
            "context": self._model.context,
            "stages": self._model.num_stages,
        }

    async def _chat(self, request: Request) -> Response:
        data = await self._body(request)
        wanted = await self._aside(data, lambda: chat_request(parse_body(data)))
        if self._model.tokenizer.template is None:
            raise ApiError(
                400,
                f"{self.name} {self._model.tokenizer.why_no_chat}; /v1/completions continues a text",
                code="no_chat",
            )
        return await self._answer(request, data, wanted, "chat")

    async def _complete(self, request: Request) -> Response:
        data = await self._body(request)
        wanted = await self._aside(data, lambda: completion_request(parse_body(data)))
        return await self._answer(request, data, wanted, "text")

    async def _aside(self, data: bytes, work: Callable[[], T]) -> T:
        """Do what takes long with a long body, beside the event loop."""
        executor = self._long_requests if len(data) > LONG_BODY else None
        return await asyncio.get_running_loop().run_in_executor(executor, work)

    async def _answer(
        self, request: Request, data: bytes, wanted: ChatRequest | CompletionRequest, kind: Kind
    ) -> Response:
        begun = time.perf_counter()
        self._check_name(wanted.model)
        most = self.limits.max_tokens or self._model.context
        policy = self._policy() if wanted.stage is None else FixedStage(wanted.stage)
        try:
            stream = await self._aside(
                data,
                lambda: self._model.stream(
                    wanted.prompt,
                    max_tokens=min(wanted.max_tokens or most, most),
                    sampling=wanted.sampling(self._temperature),
                    policy=policy,
                    stop=wanted.stop,
                    chat=kind == "chat",
                    top_logprobs=wanted.wanted_logprobs,
                ),
            )
        except FlrcError as error:
            raise ApiError.of(error) from None
        gone = asyncio.ensure_future(_disconnected(request.receive))
        try:
            if not await _first(self.places.take(), gone):
                raise ClientDisconnect
        except FullError:
            gone.cancel()
            raise ApiError(
                429,
                f"{self.limits.queue} requests are waiting already",
                code="queue_full",
                headers={"retry-after": "1"},
            ) from None
        except BaseException:
            gone.cancel()
            raise
        reply = Reply(kind, self.name, self._model.tokenizer)
        generation = Generation(stream, self._executor)
        answer = Answer(self, generation, reply, gone, begun, include_usage=wanted.include_usage)
        return answer if wanted.stream else await answer.whole()

    async def _body(self, request: Request) -> bytes:
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            # A web page cannot send that to another host without asking first.
            raise ApiError(415, "the content type must be application/json")
        most, data = self.limits.body_bytes, bytearray()
        too_large = ApiError(413, f"the body is larger than {most} bytes", headers={"connection": "close"})
        if int(request.headers.get("content-length", "0")) > most:  # uvicorn lets only a number through
            raise too_large
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    data += part
                    if len(data) > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, "the body took too long", headers={"connection": "close"}) from None
        return bytes(data)

    def _check_name(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"there is no model {name!r} here, only {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def _refusal(self, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    async def _http_error(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = {404: "there is no such route", 405: "the route takes another method"}
        refused = ApiError(error.status_code, text.get(error.status_code, error.detail))
        return JSONResponse(refused.body(), error.status_code, headers=error.headers)

    async def _failure(self, _: Request, error: Exception) -> Response:
        return self._refusal(ApiError(500, FAILED))


class Answer(Response):
    """Sends an answer, and gives its place back when it ends, however it ends.

    Args:
        server: Whose place it has.
        generation: Of its tokens.
        reply: The form of its bodies.
        gone: Done when the client is.
        begun: When the request came, as ``time.perf_counter`` says.
        include_usage: End a stream with the token counts.
    """

    def __init__(
        self,
        server: Server,
        generation: Generation,
        reply: Reply,
        gone: asyncio.Future[None],
        begun: float,
        *,
        include_usage: bool,
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._server, self._generation, self._reply = server, generation, reply
        self._gone, self._begun, self._include_usage = gone, begun, include_usage
        self._tokens: list[Token] = []

    async def whole(self) -> Response:
        """Return the whole answer at once.

        Raises:
            ClientDisconnect: Nobody waits for it any more.
        """
        try:
            if not await _first(self._collect(), self._gone):
                raise ClientDisconnect
        finally:
            await self._end()
        return JSONResponse(self._reply.whole(self._tokens))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send tokens as they come."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _first(self._send(send), self._gone)
        finally:
            await self._end()

    async def _collect(self) -> None:
        async for token in self._generation.tokens():
            self._note(token)

    async def _send(self, send: Send) -> None:
        async def put(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            async for token in self._generation.tokens():
                self._note(token)
                await put(event(self._reply.piece(token)))
        except Exception as error:  # the status is sent already
            if not isinstance(error, ApiError):
                _log.exception("an answer failed")
            said = error if isinstance(error, ApiError) else ApiError(500, FAILED)
            await put(event(said.body()), more=False)
            return
        if self._include_usage:
            await put(event(self._reply.counts(self._tokens)))
        await put(event("[DONE]"), more=False)

    def _note(self, token: Token) -> None:
        metrics = self._server.metrics
        if not self._tokens:
            metrics.first_token.observe(time.perf_counter() - self._begun)
            metrics.prompt_tokens.inc(token.prompt_tokens)
        metrics.tokens.labels(str(token.stage)).inc()
        self._tokens.append(token)

    async def _end(self) -> None:
        if self._gone.done() and (not self._tokens or self._tokens[-1].finish_reason is None):
            self._server.metrics.abandoned.inc()
        self._gone.cancel()
        try:
            await self._generation.stop()
        finally:
            self._server.places.give_back()


async def _disconnected(receive: Receive) -> None:
    """Return when the client goes away; the body was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first(work: Any, gone: asyncio.Future[None]) -> bool:
    """Do ``work`` unless the client goes first, then it is cancelled; return whether it was done.

    Raises:
        Exception: What ``work`` raises.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
