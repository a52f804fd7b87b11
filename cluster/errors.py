"""The tree of errors that can end a request, each with its HTTP status and OpenAI error type.

Every room raises them; they cross processes as plain fields, and the router renders them. A mistake in a call of the
Python API is a `ValueError`; over HTTP the same mistake is a `RequestRejected`.
"""

from __future__ import annotations

from typing import ClassVar

_BY_CODE: dict[str, type[TensorweaveError]] = {}


class TensorweaveError(Exception):
    """Root of the tree. `message` is for the client: it names the cause and never contains prompt text."""

    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init_subclass__(cls) -> None:
        """Register the class by its code, so that an error keeps its status when it crosses processes."""
        super().__init_subclass__()
        if "code" in vars(cls):
            _BY_CODE[cls.code] = cls

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def to_wire(self) -> dict[str, str | float | None]:
        return {"code": self.code, "message": self.message, "param": self.param, "retry_after_s": self.retry_after_s}


class RequestRejected(TensorweaveError, ValueError):
    """The request itself is wrong; `param` names the field. Sending it again would fail again."""

    http_status, openai_type, code = 400, "invalid_request_error", "invalid_request"


class ModelNotFound(RequestRejected):
    http_status, openai_type, code = 404, "invalid_request_error", "model_not_found"


class ContextTooLong(RequestRejected):
    """Prompt and answer do not fit in the model's context (see `cluster.context_length`)."""

    code = "context_length_exceeded"


class Overloaded(TensorweaveError):
    """A bounded queue is full. `retry_after_s` says when to come back."""

    http_status, openai_type, code = 429, "rate_limit_error", "overloaded"


class NotReady(TensorweaveError):
    """No gang accepts the request now: all are starting, draining or lost."""

    http_status, openai_type, code = 503, "server_error", "not_ready"


class InsufficientResources(NotReady):
    """The Ray cluster has no free resources for a gang now."""


class WorkerLost(TensorweaveError):
    """The gang that ran the request died or hung."""

    http_status, openai_type, code = 503, "server_error", "worker_lost"


class TransferFailed(TensorweaveError):
    """KV blocks did not arrive, or were wrong."""

    http_status, openai_type, code = 502, "server_error", "transfer_failed"


class LogitsNotFinite(TensorweaveError):
    """The model's logits for this request's next token are NaN or infinite, so it has no answer."""

    code = "logits_not_finite"

    @classmethod
    def of_model(cls) -> LogitsNotFinite:
        return cls("the model's logits for the next token are not finite (NaN or infinity); the request ends here")


class WireError(TensorweaveError):
    """A peer has violated our protocol."""

    code = "wire_error"


class RequestCancelled(TensorweaveError):
    """The client disconnected or cancelled."""

    http_status, openai_type, code = 499, "invalid_request_error", "cancelled"


class DeadlineExceeded(TensorweaveError):
    """The request's own deadline has passed."""

    http_status, openai_type, code = 408, "timeout_error", "deadline_exceeded"


def raised_by_user(error: BaseException) -> RequestRejected:
    """For SystemExit, KeyboardInterrupt or GeneratorExit that a user's own code (a tokenizer, a logits processor)
    raised within a request: it would end the thread that it runs on, and all requests with it."""
    return RequestRejected(f"code of the user's own raised {type(error).__name__}: {error}")


def error_from_wire(fields: dict[str, str | float | None]) -> TensorweaveError:
    """Rebuild an error from `to_wire` fields; an unknown code becomes the root."""
    cls = _BY_CODE.get(str(fields.get("code")), TensorweaveError)
    retry = fields.get("retry_after_s")
    param = fields.get("param")
    return cls(
        str(fields.get("message", "")),
        param=None if param is None else str(param),
        retry_after_s=None if retry is None else float(retry),
    )
