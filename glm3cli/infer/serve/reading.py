"""Reads the bodies of HTTP requests, and notices clients that leave."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from glm3cli.host.parsing import parse_json
from glm3cli.infer.serve.protocol.errors import (
    ApiError,
    TooLargeError,
    TooSlowError,
    WrongTypeError,
)

# The largest body: so many bytes, or those of a prompt that fills the model's positions, each token
# of which is an id or a text, with what JSON needs around it.
_BYTES = 4 * 2**20
_BYTES_PER_TOKEN = 16
# The seconds in which a body must have come.
_PATIENCE = 60.0

Result = TypeVar("Result")


def most_bytes(num_tokens: int) -> int:
    """Returns the largest body for a model that takes so many tokens, in bytes."""
    return max(_BYTES, _BYTES_PER_TOKEN * num_tokens)


async def read_json(request: Request, most: int) -> Any:
    """Returns the JSON value that a request has as its body.

    Args:
        request: The request.
        most: The most bytes of the body.

    Raises:
        ApiError: It isn't JSON, isn't said to be, is compressed, is too large, or doesn't come to
            its end.
    """
    # A web page of anybody's can't send JSON without asking the browser, which asks us.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise WrongTypeError("send JSON, with Content-Type: application/json")
    if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
        raise WrongTypeError(f"send the body as it is, without Content-Encoding: {encoding}")
    try:
        async with asyncio.timeout(_PATIENCE):
            data = await _read(request, most)
    except TimeoutError:
        raise TooSlowError(f"the body hasn't come within {_PATIENCE:.0f} s") from None
    try:
        value = parse_json(data.decode())
        # JSON can spell halves of characters, which no text may have.
        if b"\\u" in data:
            _check_characters(value)
    except UnicodeDecodeError as error:
        raise ApiError(f"the body isn't UTF-8: byte {error.start} can't be read") from None
    except ValueError as error:
        raise ApiError(f"the body isn't JSON: {error}") from None
    return value


async def _read(request: Request, most: int) -> bytes:
    """Returns the body of a request, of at most so many bytes.

    Raises:
        TooLargeError: It is too large; the rest isn't read.
    """
    data = bytearray()
    told = request.headers.get("content-length", "0")
    size = int(told) if told.isascii() and told.isdigit() else 0
    if size <= most:
        async for part in request.stream():
            data += part
            if len(data) > most:
                break
    if max(size, len(data)) > most:
        raise TooLargeError(f"the body has more than {most} bytes")
    return bytes(data)


def _check_characters(value: Any) -> None:
    """Checks that all texts of a JSON value are whole.

    Raises:
        ValueError: One has half of a surrogate pair.
    """
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_characters(key)
            _check_characters(item)
    elif isinstance(value, list):
        for item in value:
            _check_characters(item)


async def until_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Returns the result of some work, which is cancelled if the client leaves.

    Args:
        request: The request, whose body has been read.
        work: The work.

    Raises:
        ClientDisconnect: The client has left.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_leaving(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _leaving(request: Request) -> None:
    """Waits until the client of a request leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
