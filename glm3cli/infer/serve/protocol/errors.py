"""`ApiError`: what a client gets that asks for something that can't be had."""

from typing import Any


class ApiError(Exception):
    """An error in OpenAI's form.

    Attributes:
        status: The status of the HTTP response.
        headers: Further headers of the response.
    """

    status = 400
    _kind = "invalid_request_error"
    _code: str | None = None

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        """Makes an error.

        Args:
            message: What is wrong, and what the client can do.
            param: The field of the request that is wrong; None if no single one is.
            code: OpenAI's word for this kind of error; None for the class's own.
        """
        super().__init__(message)
        self.message = message
        self.headers: dict[str, str] = {}
        self._param = param
        self._code = code or self._code

    def to_dict(self) -> dict[str, Any]:
        """Returns the error as OpenAI's clients read it."""
        told = {"message": self.message, "type": self._kind, "param": self._param}
        return {"error": {**told, "code": self._code}}


class NoKeyError(ApiError):
    """A request without a key that is known."""

    status = 401
    _kind = "authentication_error"
    _code = "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.headers = {"WWW-Authenticate": "Bearer"}


class NotFoundError(ApiError):
    """A request for a model or an address that doesn't exist."""

    status = 404
    _code = "not_found"


class WrongMethodError(ApiError):
    """A request by a method that the address doesn't know."""

    status = 405
    _code = "method_not_allowed"


class TooSlowError(ApiError):
    """A request that has taken longer than it may."""

    status = 408
    _kind = "timeout_error"
    _code = "timeout"


class TooLargeError(ApiError):
    """A request whose body is larger than it may be."""

    status = 413
    _code = "request_too_large"


class WrongTypeError(ApiError):
    """A request whose body isn't said to be JSON."""

    status = 415
    _code = "unsupported_media_type"


class TooBusyError(ApiError):
    """A request that comes while as many wait as may."""

    status = 429
    _kind = "rate_limit_error"
    _code = "rate_limit_exceeded"

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.headers = {"Retry-After": str(seconds)}


class ServerError(ApiError):
    """A request whose answer couldn't be made to its end."""

    status = 500
    _kind = "server_error"
    _code = "internal_error"


class StoppingError(ApiError):
    """A request that comes after the server was asked to stop, or was cut off by that."""

    status = 503
    _kind = "server_error"
    _code = "service_unavailable"

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.headers = {"Retry-After": str(seconds)}
