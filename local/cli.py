"""What all command lines and notebooks of the project share: errors that are sentences."""

import os
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """Something the person can put right; the message says what was wrong and what to do.

    Command lines print it and exit with 1. Jupyter shows the sentence instead of a traceback.
    """

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def run(main: Callable[[], None]) -> None:
    """Run a command line: a UserError becomes its sentence and status 1, Ctrl-C status 130."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; nothing half-written was left", file=sys.stderr)
        sys.exit(130)


def shown(path: Path) -> str:
    """A path as a person in the current folder would type it."""
    relative = os.path.relpath(path)
    return relative if relative.count("..") < 3 else str(path)
