"""`Metrics`: what Prometheus reads at /metrics."""

import time
from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from glm3cli.infer.serve.queries import Queries

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Metrics:
    """Counts and times since the server has started.

    Attributes:
        requests: Requests that have ended, by address and status.
        prompt_tokens: Tokens of prompts.
        new_tokens: Tokens of answers.
        first_token: Seconds from a request to its first token.
        whole: Seconds from a request to its end, by address.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, queries: "Queries") -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "glm3_requests", "Requests.", ["path", "status"], registry=self._registry
        )
        self.prompt_tokens = Counter(
            "glm3_prompt_tokens", "Tokens of prompts.", registry=self._registry
        )
        self.new_tokens = Counter("glm3_new_tokens", "Tokens of answers.", registry=self._registry)
        self.first_token = Histogram(
            "glm3_first_token_seconds",
            "Until the first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.whole = Histogram(
            "glm3_request_seconds",
            "Until the end.",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        running = Gauge(
            "glm3_running", "Answers that have a place in the batch.", registry=self._registry
        )
        running.set_function(lambda: queries.num_running)
        waiting = Gauge("glm3_waiting", "Answers that wait for a place.", registry=self._registry)
        waiting.set_function(lambda: queries.num_waiting)
        ProcessCollector(registry=self._registry)

    def watch(self, loads: Sequence[int]) -> None:
        """Shows how many answers are under way in each copy of the model.

        Args:
            loads: Their numbers, which change.
        """
        gauge = Gauge(
            "glm3_under_way",
            "Answers that run or wait in a copy of the model.",
            ["copy"],
            registry=self._registry,
        )
        for copy in range(len(loads)):
            gauge.labels(str(copy)).set_function(partial(loads.__getitem__, copy))

    def text(self) -> bytes:
        """Returns all of it in Prometheus's text format."""
        return generate_latest(self._registry)


class Counted:
    """An ASGI app that counts the requests of another one."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        """Counts for an app.

        Args:
            app: The app.
            metrics: What counts.
            paths: The addresses that are counted by themselves, and not as `other`.
        """
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, and counts it when it has ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"
        status, started = "gone", time.perf_counter()

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            self._metrics.requests.labels(path, status).inc()
            self._metrics.whole.labels(path).observe(time.perf_counter() - started)
