"""What the command lines of this package share: errors that are sentences, and exit statuses."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the person can put right; the message is one sentence that says what was wrong."""


def run(main: Callable[[], None]) -> None:
    """Run a command line: a `UserError` becomes its sentence and status 1, Ctrl-C status 130."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted; nothing half-written was left", file=sys.stderr)
        sys.exit(130)
