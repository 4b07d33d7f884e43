"""What a client gets instead of an answer: OpenAI's error body, and the exception that carries what
goes into it.

Refuses to know http: a status is a number here, which the server sends and a batch writes into its
output line.
"""

from typing import Any

from llama_tp.arch.errors import UserError

MAX_CHARS = 1000  # of a message: a small request must not earn a large reply
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class RequestError(UserError):
    """A request that is not answered.

    Args:
        what, found, fix: as UserError's.
        param: the field at fault, where there is one.
        code: OpenAI's short word for programs, such as "context_length_exceeded".
        status: of http; 400 and the like for the client's faults, 500 and more for ours.

    Attributes:
        retry_s: in how many seconds it may be asked again; None says nothing about it.
    """

    retry_s: int | None = None

    def __init__(
        self,
        what: str,
        found: str = "",
        fix: str = "",
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
    ):
        super().__init__(what, found, fix)
        self.param, self.code, self.status = param, code, status


def invalid(param: str, what: str, found: str, fix: str) -> RequestError:
    """The refusal of a field's value."""
    return RequestError(what, found, fix, param=param, code="invalid_value")


def unsupported(param: str, found: str, fix: str) -> RequestError:
    """The refusal of a field, or of a value, that has a meaning elsewhere and none here."""
    return RequestError(
        f"{param} is not supported", found, fix, param=param, code="unsupported_parameter"
    )


def status_of(error: UserError) -> int:
    """The http status of any UserError: 400 unless it says otherwise."""
    return error.status if isinstance(error, RequestError) else 400


def error_body(error: UserError) -> dict[str, Any]:
    """{"error": {"message", "type", "param", "code"}}, as OpenAI's clients read it; code is a text
    or None."""
    status = status_of(error)
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    # what was found may hold a lone surrogate
    message = str(error).encode("utf-8", "replace").decode()
    message = message if len(message) <= MAX_CHARS else message[: MAX_CHARS - 3] + "..."
    param, code = (error.param, error.code) if isinstance(error, RequestError) else (None, None)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
