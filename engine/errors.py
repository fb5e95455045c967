"""What the engine raises.

EngineError
├── ConfigurationError       the engine's options do not work together, or with this model or device (start-up)
├── InvalidRequestError      a request's mistake; `param` names the field, `code` is machine readable or None
│   └── ContextLengthError   prompt (+ max_tokens) does not fit the context; code "context_length_exceeded"
├── EngineOverloadedError    the queue is full, or the engine is shutting down; try again later
├── RequestFailedError       one request failed inside the engine; others are not touched
└── EngineDeadError          the engine process is gone or hangs
"""


class EngineError(Exception):
    """Base of all errors raised by `engine`."""


class ConfigurationError(EngineError):
    """The engine cannot start with these options; the message says what would work."""


class InvalidRequestError(EngineError):
    """A request that can never be served. `param` names the field at fault."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(InvalidRequestError):
    """The prompt, or the prompt with max_tokens, is longer than the context."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class EngineOverloadedError(EngineError):
    """Refused for now: too many requests wait, or the engine drains. `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestFailedError(EngineError):
    """This request failed inside the engine."""


class EngineDeadError(EngineError):
    """The engine process ended or no longer answers."""
