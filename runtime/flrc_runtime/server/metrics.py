"""What the server did so far, as Prometheus reads it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .turns import Places


class Metrics:
    """Counters of one server, in a registry of its own.

    Args:
        places: Whose load is shown.
    """

    def __init__(self, places: Places) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "flrc_requests", "Requests by route and status.", ["route", "status"], registry=self._registry
        )
        self.tokens = Counter(
            "flrc_generated_tokens",
            "Tokens by the stage that computed them.",
            ["stage"],
            registry=self._registry,
        )
        self.prompt_tokens = Counter("flrc_prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self.abandoned = Counter(
            "flrc_abandoned_answers", "Answers whose client went away.", registry=self._registry
        )
        self.first_token = Histogram(
            "flrc_first_token_seconds",
            "From a request to its first token, waiting included.",
            registry=self._registry,
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
        )
        active = Gauge("flrc_active_answers", "Answers being computed.", registry=self._registry)
        active.set_function(lambda: places.taken)
        waiting = Gauge("flrc_waiting_requests", "Requests that wait for a place.", registry=self._registry)
        waiting.set_function(lambda: places.waiting)

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self._registry)
