"""The error that is told to a person as a sentence."""


class UserError(Exception):
    """Something the person can put right; the message says what was wrong and what to do.

    Command lines print it and exit with 1. Jupyter shows the sentence instead of a traceback.
    """

    def _render_traceback_(self) -> list[str]:
        return [str(self)]
