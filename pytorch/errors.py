"""What can go wrong with a request, as fetch.py and model.py raise it and app.py answers it."""


class RequestError(Exception):
    """A request that cannot be answered: an HTTP status, a code for programs, a sentence."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status = status
        self.code = code
