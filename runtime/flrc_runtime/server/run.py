"""Listen until told to stop; then no new requests, and those at work get a little time."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import FlrcError, UsageError
from .app import Server

HEADER_SECONDS = 10.0  # until the first request's headers are whole
IDLE_SECONDS = 30  # that a connection may be kept without a request
GRACE_SECONDS = 10  # for answers at work when the server ends
MOST_CONNECTIONS = 512
_log = logging.getLogger(__name__)


class PatientProtocol(H11Protocol):
    """HTTP whose client must begin a request in time: uvicorn alone waits for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEADER_SECONDS, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection; the timer would keep it for as long as it waits."""
        self._timer.cancel()
        super().connection_lost(exc)

    def _late(self) -> None:
        begun: object = self.cycle  # None until a request came, which uvicorn's types do not say
        if begun is None and not self.transport.is_closing():
            self.transport.close()


def check_host(host: str, *, protected: bool, public: bool) -> frozenset[str] | None:
    """Refuse to listen to other machines without a key, unless that is wanted.

    Args:
        host: Name or address to listen on.
        protected: Whether there is a key.
        public: Whether it is wanted without one.

    Returns:
        The names that requests may be for; None for any, where a key or the user's word protects.

    Raises:
        UsageError: It is refused.
    """
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not (local or protected or public):
        raise UsageError(
            f"{host} can be reached by other machines, and there is no key",
            hint="name a file with a key (--api-key-file), or say --public",
        )
    return None if protected or public else frozenset({"localhost", "127.0.0.1", "::1", host})


def read_key(path: Path) -> str:
    """Return the key that a file holds.

    Raises:
        UsageError: The file cannot be read, or holds no key.
    """
    try:
        key = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if len(key) < 8 or not key.isascii() or any(c.isspace() for c in key):
        raise UsageError(f"{path} must hold one key of at least 8 letters, digits and signs")
    return key


def run(server: Server, *, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        server: Whose routes.
        host: Name or address to listen on.
        port: To listen on; 0 for a free one.

    Raises:
        FlrcError: The port cannot be listened on.
        KeyboardInterrupt: SIGINT, after all is ended.
    """
    config = uvicorn.Config(
        server.app(),
        host=host,
        port=port,
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        limit_concurrency=MOST_CONNECTIONS,
    )
    try:
        listener = config.bind_socket()
    except SystemExit:  # uvicorn logs why and exits
        raise FlrcError(
            f"port {port} of {host} cannot be listened on",
            hint="choose another --port, or end what listens there",
        ) from None
    listener.listen(MOST_CONNECTIONS)  # from here on clients wait instead of being refused
    address = listener.getsockname()
    _log.info("%s at http://%s:%d/v1, Ctrl-C ends it", server.name, address[0], address[1])
    # uvicorn raises the signal again once it has ended: SIGTERM is no error then.
    before: Any = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()
