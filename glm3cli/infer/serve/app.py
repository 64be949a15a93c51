"""`Service`: the HTTP app, with one method for each address."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from glm3cli.infer.serve.guard import Guard
from glm3cli.infer.serve.metrics import Counted, Metrics
from glm3cli.infer.serve.protocol.answer import Answer, Served
from glm3cli.infer.serve.protocol.asked import Asked, Reader
from glm3cli.infer.serve.protocol.bodies import (
    AnyBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    read_body,
)
from glm3cli.infer.serve.protocol.chat import ChatAnswer
from glm3cli.infer.serve.protocol.choices import Piece
from glm3cli.infer.serve.protocol.completion import CompletionAnswer
from glm3cli.infer.serve.protocol.document import document
from glm3cli.infer.serve.protocol.errors import (
    ApiError,
    NotFoundError,
    ServerError,
    TooSlowError,
    WrongMethodError,
)
from glm3cli.infer.serve.protocol.tokens import detokenize, tokenize, tokenizer_info
from glm3cli.infer.serve.queries import Queries, Query
from glm3cli.infer.serve.reading import most_bytes, read_json, until_gone

# The seconds of silence after which a stream gets a comment, so that nobody on the way ends it.
_HEARTBEAT = 15.0
# Pieces of choices by their indices; None while there is nothing new.
_Pieces = AsyncIterator[list[tuple[int, Piece]] | None]


@dataclass(frozen=True)
class Policy:
    """What a service allows.

    Attributes:
        models: What clients can ask; the first one unless they name one.
        keys: The API keys; without any, nobody needs one.
        timeout: The seconds after which a request is given up.
        origins: The web pages that may call from a browser.
    """

    models: tuple[Served, ...]
    keys: tuple[bytes, ...] = ()
    timeout: float = 600.0
    origins: tuple[str, ...] = ()


class Service:
    """Answers HTTP requests.

    Attributes:
        queries: What is under way.
        metrics: What is counted.
    """

    def __init__(self, reader: Reader, queries: Queries, policy: Policy) -> None:
        """Prepares a service.

        Args:
            reader: Reads what the engine is asked.
            queries: Where the engine is asked.
            policy: What is allowed.
        """
        self.queries = queries
        self.metrics = Metrics(queries)
        self._reader = reader
        self._policy = policy
        self._created = int(time.time())

    @cached_property
    def app(self) -> Starlette:
        """The ASGI app."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/openapi.json", self.description),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]
        middleware = [
            Middleware(Counted, metrics=self.metrics, paths=[route.path for route in routes]),
            Middleware(Guard, keys=self._policy.keys),
        ]
        if self._policy.origins:
            cors = Middleware(
                CORSMiddleware,
                allow_origins=self._policy.origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
            )
            middleware.insert(1, cors)
        return Starlette(
            routes=routes,
            middleware=middleware,
            exception_handlers={
                ApiError: _refuse,
                HTTPException: _refuse_http,
                ClientDisconnect: _forget,
                500: _confess,
            },
        )

    async def page(self, _request: Request) -> Response:
        """Shows the chat page."""
        return HTMLResponse(self._page, headers={"Content-Security-Policy": _ONLY_OURS})

    @cached_property
    def _page(self) -> str:
        return files(__package__).joinpath("page.html").read_text("utf-8")

    async def health(self, _request: Request) -> Response:
        """Says whether requests are taken."""
        if self.queries.is_stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, _request: Request) -> Response:
        """Shows what is counted, in Prometheus's form."""
        return Response(self.metrics.text(), media_type=self.metrics.content_type)

    async def description(self, _request: Request) -> Response:
        """Shows the OpenAPI document."""
        return JSONResponse(document())

    async def models(self, _request: Request) -> Response:
        """Lists the names of models."""
        return JSONResponse(
            {"object": "list", "data": [self._shown(model) for model in self._policy.models]}
        )

    async def model(self, request: Request) -> Response:
        """Shows one model."""
        return JSONResponse(self._shown(self._model(request.path_params["name"])))

    async def completions(self, request: Request) -> Response:
        """Continues prompts."""
        body = await self._read(CompletionBody, request)
        return await self._answer(request, body, self._reader.completion, CompletionAnswer)

    async def chat(self, request: Request) -> Response:
        """Answers in a chat."""
        body = await self._read(ChatBody, request)
        return await self._answer(request, body, self._reader.chat, ChatAnswer)

    async def tokenizer_info(self, _request: Request) -> Response:
        """Describes the tokenizer."""
        return JSONResponse(tokenizer_info(self._reader))

    async def tokenize(self, request: Request) -> Response:
        """Turns text into token ids."""
        body = await self._read(TokenizeBody, request)
        self._model(body.model)
        return JSONResponse(await asyncio.to_thread(tokenize, self._reader, body))

    async def detokenize(self, request: Request) -> Response:
        """Turns token ids into text."""
        body = await self._read(DetokenizeBody, request)
        self._model(body.model)
        return JSONResponse(await asyncio.to_thread(detokenize, self._reader, body))

    async def _read(self, kind: type[AnyBody], request: Request) -> AnyBody:
        """Returns the body of a request, checked."""
        return read_body(kind, await read_json(request, most_bytes(self._reader.max_tokens)))

    def _shown(self, model: Served) -> dict[str, Any]:
        """Returns a model as OpenAI shows it."""
        about = {"id": model.name, "object": "model", "created": self._created, "owned_by": "glm3"}
        parent = self._policy.models[0].name if model.adapter else None
        return about | {"parent": parent, "max_model_len": self._reader.max_tokens}

    def _model(self, name: str | None) -> Served:
        """Returns the model of a name.

        Raises:
            NotFoundError: There is no such model.
        """
        if name is None:
            return self._policy.models[0]
        models = {model.name: model for model in self._policy.models}
        if name not in models:
            known = ", ".join(models)
            raise NotFoundError(
                f"there is no model {name!r}; there is {known}", "model", "model_not_found"
            )
        return models[name]

    async def _answer(
        self,
        request: Request,
        body: Any,
        read: Callable[[Any], Asked],
        kind: Callable[[Reader, Asked, Any, Served], Answer],
    ) -> Response:
        """Answers a completion or a chat.

        Args:
            request: The request.
            body: Its body.
            read: Makes of the body what the engine is asked.
            kind: The class of the answer.
        """
        started = time.perf_counter()
        model = self._model(body.model)
        asked = await asyncio.to_thread(read, body)  # long texts, and grammars, take their time
        answer = kind(self._reader, asked, body, model)
        query = self.queries.open(answer.makers)
        pieces = self._pieces(answer, query, started)
        if body.stream:
            return _Events(_events(answer, pieces), query)
        with query:
            whole: dict[int, Piece] = {}
            return JSONResponse(await until_gone(request, _collected(answer, pieces, whole)))

    async def _pieces(self, answer: Answer, query: Query, started: float) -> _Pieces:
        """Yields an answer as it comes.

        Raises:
            ApiError: It has ended by an error, or takes too long.
        """
        yield list(answer.first())
        deadline = started + self._policy.timeout
        has_token = False
        async for found in query.updates(min(_HEARTBEAT, self._policy.timeout)):
            if time.perf_counter() > deadline:
                raise TooSlowError(f"the answer isn't there after {self._policy.timeout:g} s")
            if found is None:
                yield None
                continue
            if not has_token:
                self.metrics.first_token.observe(time.perf_counter() - started)
                has_token = True
            yield list(answer.take(*found))
        self.metrics.prompt_tokens.inc(answer.num_prompt_tokens)
        self.metrics.new_tokens.inc(answer.num_new_tokens)


# What the page may load: what stands in it, and what this server says.
_ONLY_OURS = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class _Events(StreamingResponse):
    """A stream of server-sent events, which ends its query whatever becomes of the client."""

    def __init__(self, events: AsyncIterator[str], query: Query) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._query = query

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._query:
            await super().__call__(scope, receive, send)


async def _events(answer: Answer, pieces: _Pieces) -> AsyncIterator[str]:
    """Yields an answer as server-sent events."""
    try:
        async for found in pieces:
            if found is None:
                yield ": waiting\n\n"
            for index, piece in found or ():
                for chunk in answer.chunks(index, piece):
                    yield _event(chunk)
        if last := answer.last_chunk():
            yield _event(last)
    except ApiError as error:
        yield _event(error.to_dict())
    yield "data: [DONE]\n\n"


def _event(value: Mapping[str, Any]) -> str:
    """Returns a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _collected(answer: Answer, pieces: _Pieces, whole: dict[int, Piece]) -> dict[str, Any]:
    """Returns a whole answer."""
    async for found in pieces:
        for index, piece in found or ():
            whole[index] = whole.get(index, Piece()) + piece
    return answer.whole(whole)


async def _refuse(_request: Request, error: Exception) -> Response:
    """Answers what can't be done."""
    assert isinstance(error, ApiError)
    return JSONResponse(error.to_dict(), error.status, error.headers)


async def _refuse_http(request: Request, error: Exception) -> Response:
    """Answers what Starlette refuses: an address or a method that doesn't exist."""
    assert isinstance(error, HTTPException)
    if error.status_code == WrongMethodError.status:
        told: ApiError = WrongMethodError(f"{request.url.path} doesn't know {request.method}")
        told.headers = dict(error.headers or {})
    else:
        told = NotFoundError(f"there is no {request.url.path}")
    return await _refuse(request, told)


async def _forget(_request: Request, _error: Exception) -> Response:
    """Ends a request whose client has left."""
    return Response(status_code=499)  # nobody reads it


async def _confess(request: Request, _error: Exception) -> Response:
    """Answers after a bug of ours, whose traceback is in the log."""
    return await _refuse(request, ServerError("a bug of the server; its log says more"))
