"""The description of the server in the form of OpenAPI 3.1."""

import functools
from typing import Any

from pydantic.json_schema import models_json_schema

from glm3cli.infer.serve.protocol.bodies import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from glm3cli.version import __version__

_BODIES: dict[str, type[Body]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
_SUMMARIES = {
    "/v1/completions": "Continue texts.",
    "/v1/chat/completions": "Answer in a chat.",
    "/v1/models": "List the models.",
    "/v1/models/{name}": "Show a model.",
    "/health": "Say whether requests are taken.",
    "/metrics": "Show counts and times for Prometheus.",
    "/tokenizer_info": "Describe the tokenizer.",
    "/tokenize": "Turn a text into token ids.",
    "/detokenize": "Turn token ids into a text.",
}
_STATUSES = {
    "400": "The request makes no sense.",
    "401": "The key is missing or unknown.",
    "404": "There is no such model.",
    "408": "It has taken too long.",
    "413": "The body is too large.",
    "415": "The body isn't JSON.",
    "429": "Too much is under way.",
    "500": "The answer couldn't be made.",
    "503": "The server stops.",
}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


@functools.cache
def document() -> dict[str, Any]:
    """Returns the description."""
    _, schemas = models_json_schema(
        [(body, "validation") for body in _BODIES.values()],
        ref_template="#/components/schemas/{model}",
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "glm3", "version": __version__},
        "paths": {path: _item(path) for path in _SUMMARIES},
        "components": {
            "schemas": {**schemas["$defs"], "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _item(path: str) -> dict[str, Any]:
    """Returns what an address knows."""
    operation: dict[str, Any] = {"summary": _SUMMARIES[path], "responses": _responses(path)}
    if "{name}" in path:
        operation["parameters"] = [
            {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    body = _BODIES.get(path)
    if body is None:
        return {"get": operation}
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    content = {"application/json": {"schema": schema}}
    return {"post": {**operation, "requestBody": {"required": True, "content": content}}}


def _responses(path: str) -> dict[str, Any]:
    """Returns what an address answers."""
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if path == "/metrics":
        content = {"text/plain": {"schema": {"type": "string"}}}
    if path.endswith("completions"):
        # Of each event: before OpenAPI 3.2 nothing else can describe them.
        fields = {"data": {"type": "string"}}
        event = {"type": "object", "properties": fields, "required": ["data"]}
        content["text/event-stream"] = {"schema": event}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    refusals = {
        status: {"description": text, "content": error} for status, text in _STATUSES.items()
    }
    return {"200": {"description": "It has worked.", "content": content}, **refusals}
