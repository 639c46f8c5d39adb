"""Write a file or a directory so that another process, or a kill, sees all of it or nothing."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from local.cli import UserError

FULL = 1 << 20  # bytes free, or fewer


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write a file or a directory to; on success it becomes `path`.

    On an exception what was written is removed. What a killed process left is removed by the next
    writer of the same path. A directory can only take the place of an empty one (`os.replace`).

    Raises:
        UserError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer knows RuntimeError only
        if shutil.disk_usage(path.parent).free > FULL:
            raise
        raise UserError(f"the disk is full: {path} was not written") from error
    finally:
        _remove(partial)


def _remove_abandoned(path: Path) -> None:
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.partial")
    for sibling in path.parent.iterdir():
        match = name.fullmatch(sibling.name)
        if match and not _alive(int(match[1])):
            _remove(sibling)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's process, so there is one
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
