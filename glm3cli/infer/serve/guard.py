"""`Guard`: stands before the app, and lets in what has a key, is JSON, and is not too large."""

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from glm3cli.infer.serve.protocol.errors import ApiError, NoKeyError

# What anyone may see: whether the server lives, its description, and the page, which asks for a
# key itself.
_OPEN = ("/", "/health", "/openapi.json")


class Guard:
    """An ASGI app before another one."""

    def __init__(self, app: ASGIApp, keys: Sequence[bytes]) -> None:
        """Stands before an app.

        Args:
            app: The app.
            keys: The keys, of which a client must send one; without any, nobody must.
        """
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        is_asked = scope["type"] == "http" and scope["method"] != "OPTIONS"
        if self._keys and is_asked and scope["path"] not in _OPEN:
            try:
                self._check_key(Headers(scope=scope))
            except ApiError as error:
                response = JSONResponse(error.to_dict(), error.status, error.headers)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_key(self, headers: Headers) -> None:
        """Checks the key of a request, in the same time whichever byte of it is wrong.

        Raises:
            NoKeyError: There is none, or it isn't known.
        """
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not key:
            raise NoKeyError("send a key: Authorization: Bearer KEY")
        sent = key.strip().encode()
        # No early end: which of the keys it is can't be measured, either.
        if not sum(hmac.compare_digest(sent, own) for own in self._keys):
            raise NoKeyError("the key isn't known")
