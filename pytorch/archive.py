"""Reads a model's bundle without trusting it. Called by model.py."""

import gzip
import hashlib
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO

from errors import ModelError

MAX_MODEL_BYTES = 2_000_000_000
MAX_TEXT_BYTES = 1_000_000
CHUNK = 1 << 20  # bytes


class Hashed:
    """A stream that computes the SHA-256 of what is read from it."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.sha256.update(data)
        return data


def _invalid(message: str) -> ModelError:
    return ModelError("model_archive_invalid", message)


def unpack(stream: BinaryIO, folder: Path, source: str) -> tuple[dict[str, Path], str]:
    """Write the members of a bundle into `folder`, no others and nowhere else.

    Returns the files by role ("model", "classes.txt", …) and the SHA-256 of the bundle in hex.
    Raises ModelError; `source` names the bundle in its message.
    """
    members: dict[str, Path] = {}
    hashed = Hashed(stream)
    try:
        with (
            gzip.GzipFile(fileobj=hashed) as unzipped,
            tarfile.open(fileobj=unzipped, mode="r|") as archive,
        ):
            for member in archive:
                name = member.name.removeprefix("./")
                role = "model" if name.endswith((".pt", ".pth")) else name
                if role not in ("model", "classes.txt", "preprocessing.json"):
                    raise ModelError(
                        "model_archive_invalid", f"{source}: unexpected member {member.name!r}."
                    )
                if not member.isreg() or "/" in name:
                    raise ModelError(
                        "model_archive_invalid",
                        f"{source}: member {member.name!r} is not a plain file.",
                    )
                if role in members:
                    raise _invalid(f"{source}: more than one {role}.")
                if member.size > (MAX_MODEL_BYTES if role == "model" else MAX_TEXT_BYTES):
                    raise ModelError(
                        "model_archive_invalid", f"{source}: member {member.name!r} is too large."
                    )
                members[role] = folder / role
                with open(members[role], "wb") as file:
                    shutil.copyfileobj(archive.extractfile(member), file, CHUNK)
            while unzipped.read(CHUNK):  # gzip checks the checksum at the end
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ModelError(
            "model_archive_invalid", f"{source} is not a complete tar.gz archive: {error}"
        ) from error
    for role in ("model", "classes.txt"):
        if role not in members:
            missing = "*.pt or *.pth file" if role == "model" else role
            raise _invalid(f"{source}: the bundle has no {missing}.")
    return members, hashed.sha256.hexdigest()
