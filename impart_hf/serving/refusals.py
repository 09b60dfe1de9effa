"""Answers of our own to requests that cannot be served, in the form of vLLM's errors."""

from collections.abc import Iterable
from typing import Any

_SHOWN = 20  # names in a message
_KINDS = {400: "BadRequestError", 404: "NotFoundError", 409: "ConflictError", 422: "UnprocessableEntityError"}


class RefusedRequestError(Exception):
    """A request that gets an answer of ours.

    Attributes:
        status, body: of the answer; the body as JSON values.
    """

    def __init__(self, status: int, body: dict[str, Any]):
        super().__init__(body)
        self.status, self.body = status, body


def refused(status: int, message: str, **more: Any) -> RefusedRequestError:
    """Return the error for an answer with a message, and further values in it."""
    kind = _KINDS.get(status, "InternalServerError")
    body = {"error": {"message": message, "type": kind, "param": None, "code": status, **more}}
    return RefusedRequestError(status, body)


def unknown(what: str, name: str, known: Iterable[str]) -> RefusedRequestError:
    """Return the error for a name that stands for nothing, with those that do."""
    names = list(dict.fromkeys(known))  # one that is loaded may be on offer as well
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    # As ASCII, because a name may hold characters that cannot be encoded in an answer.
    return refused(404, f"there is no {what} {name!a:.200}; choose one of {shown}", deltas=names)
