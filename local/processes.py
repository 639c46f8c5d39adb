"""How long a process lives: no longer than whoever needs it, even if that one is killed."""

import contextlib
import ctypes
import fcntl
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def die_with_parent(signal_: int = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when its parent ends. Only on Linux."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # prctl(2)
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal_)


@contextlib.contextmanager
def lock(path: Path, patience: float = float("inf")) -> Iterator[int]:
    """Hold a lock file, waiting up to `patience` seconds for whoever has it; gives its descriptor.

    A child that inherits the descriptor holds the lock as well, for as long as it lives. Raises
    TimeoutError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path} is held by another process") from None
                time.sleep(0.1)
        yield file.fileno()
