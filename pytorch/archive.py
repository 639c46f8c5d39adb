"""Reads a model's bundle without trusting it. Called by download.py and model.py.

Nothing of a bundle is written to a file system or executed here: the model goes to anonymous
memory, so that /tmp stays free for the layer, and the other members are short texts.
"""

import hashlib
import os
import shutil
import tarfile
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from errors import ModelError

KINDS = {".pt": "torchscript", ".pth": "torchscript", ".pt2": "export"}
TEXTS = ("classes.txt", "preprocessing.json", "model.json", "MODEL_CARD.md")
MAX_MODEL_BYTES = 1_000_000_000  # while it loads, a model is in memory twice
MAX_TEXT_BYTES = 1_000_000
MAX_PADDING_BYTES = 1_000_000  # of a tar after its last member; GNU tar writes up to 10 KB
CHUNK = 1 << 20  # bytes


@dataclass
class Archive:
    """The members of a bundle. `model` is an anonymous file, `suffix` the end of its name."""

    source: str
    model: BinaryIO
    name: str
    suffix: str
    texts: dict[str, str]
    sha256: str


class Unzipped:
    """What a gzip stream holds, and the SHA-256 of the stream itself.

    As `gzip.GzipFile`, which checks its sums too, but takes large pieces: a connection has 100 MB
    in a second, and as many calls as that has 8 KB hold it up.
    """

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.sha256 = hashlib.sha256()
        self.member = zlib.decompressobj(wbits=31)
        self.zipped = b""

    def read(self, size: int) -> bytes:
        """At most `size` bytes, none at the end. Raises EOFError and zlib.error."""
        while True:
            if not self.zipped:
                self.zipped = self.stream.read(CHUNK)
                self.sha256.update(self.zipped)
            ended = not self.zipped
            if self.member.eof and not ended:
                self.member = zlib.decompressobj(wbits=31)
            data = self.member.decompress(self.zipped, size)
            self.zipped = self.member.unconsumed_tail or self.member.unused_data
            if data or (ended and self.member.eof):
                return data
            if ended:
                raise EOFError("it ends too early")


def unpack(stream: BinaryIO, source: str, expected_sha256: str | None = None) -> Archive:
    """Read a bundle, in one pass and with bounded memory.

    Raises ModelError, also for a bundle with another SHA-256 than the expected one; `source` names
    the bundle in its message.
    """
    name, model, texts = "", None, {}
    unzipped = Unzipped(stream)
    try:
        with tarfile.open(fileobj=unzipped, mode="r|", bufsize=CHUNK) as tar:
            for member in tar:
                base = member.name.removeprefix("./")
                is_model = os.path.splitext(base)[1] in KINDS
                if not is_model and base not in TEXTS:
                    raise _invalid(source, f"unexpected member {member.name!r}.")
                if not member.isreg() or member.issparse() or "/" in base:
                    raise _invalid(source, f"member {member.name!r} is not a plain file.")
                if (is_model and model) or base in texts:
                    raise _invalid(source, f"more than one {'model' if is_model else base}.")
                if member.size > (MAX_MODEL_BYTES if is_model else MAX_TEXT_BYTES):
                    raise _invalid(source, f"member {member.name!r} is too large.")
                content = tar.extractfile(member)
                if is_model:
                    name, model = base, os.fdopen(os.memfd_create("model"), "w+b")
                    shutil.copyfileobj(content, model, CHUNK)
                    model.flush()
                else:
                    texts[base] = content.read().decode("utf-8")
            _read_to_the_end(unzipped, source)
    except UnicodeDecodeError as error:
        raise _invalid(source, f"member {base!r} is not utf-8 text ({error.reason}).") from error
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        raise ModelError(
            "model_archive_invalid", f"{source} is not a complete tar.gz archive: {error}"
        ) from error
    if model is None:
        raise _invalid(source, "the bundle has no *.pt, *.pth or *.pt2 file.")
    if "classes.txt" not in texts:
        raise _invalid(source, "the bundle has no classes.txt.")
    sha256 = unzipped.sha256.hexdigest()
    if expected_sha256 and sha256 != expected_sha256.lower():
        raise _invalid(
            source,
            f"the bundle has the SHA-256 {sha256}, but MODEL_SHA256 demands {expected_sha256}.",
        )
    return Archive(source, model, *os.path.splitext(name), texts, sha256)


def _read_to_the_end(unzipped: BinaryIO, source: str) -> None:
    """gzip checks its checksum at the end, which may be far away in a bomb."""
    read = 0
    while data := unzipped.read(CHUNK):
        read += len(data)
        if read > MAX_PADDING_BYTES:
            raise _invalid(source, "data after the last member.")


def _invalid(source: str, sentence: str) -> ModelError:
    return ModelError("model_archive_invalid", f"{source}: {sentence}")
