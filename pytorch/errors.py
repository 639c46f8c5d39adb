"""What can go wrong, as the other modules raise it and app.py answers it."""


class RequestError(Exception):
    """A request that cannot be answered: an HTTP status, a code for programs, a sentence.

    `detail` is for the log only; `headers` are the answer's, beside its usual ones.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        detail: str = "",
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.detail = detail
        self.headers = headers or {}


class ModelError(Exception):
    """The model cannot be loaded: a code for programs, and what is wrong with what, for the log."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code
