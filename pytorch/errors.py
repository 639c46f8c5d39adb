"""What can go wrong, as the other modules raise it and app.py answers it."""


class RequestError(Exception):
    """A request that cannot be answered: an HTTP status, a code for programs, a sentence."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status = status
        self.code = code


class ModelError(Exception):
    """The model cannot be loaded: a code for programs, a sentence that says what is wrong."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code
