"""What the builder does with shared libraries, of any processor and without binutils.

The dynamic loader reads program headers only. Symbol tables, debug information and the section
headers that describe them lie behind the last loaded segment in every library that a linker
wrote, and can be cut off there. The format: `man 5 elf`.
"""

import os
import struct
from pathlib import Path

from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile


def needed(path: Path) -> list[str]:
    """The names (DT_NEEDED) of the libraries that a library loads; none for another kind of file.

    Raises ELFError for a damaged one.
    """
    with path.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            return []
        return [
            tag.needed
            for segment in ELFFile(file).iter_segments()
            if isinstance(segment, DynamicSegment)
            for tag in segment.iter_tags("DT_NEEDED")
        ]


def strip(path: Path) -> int:
    """Cuts everything off a 64-bit little-endian ELF file that is not loaded into memory.

    Returns the number of bytes saved: 0 for a file of another kind (left alone). The file is
    replaced, never changed in place: the original may be shared by a hard link.
    """
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        return 0
    (program_headers,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    end = program_headers + size * count
    for i in range(count):
        _, _, offset, _, _, file_size = struct.unpack_from(
            "<IIQQQQ", data, program_headers + i * size
        )
        end = max(end, offset + file_size)
    if end >= len(data):
        return 0
    header = bytearray(data[:64])
    struct.pack_into("<Q", header, 40, 0)  # e_shoff: no section headers any more
    struct.pack_into("<HH", header, 60, 0, 0)  # e_shnum, e_shstrndx
    stripped = path.with_name(path.name + ".stripped")
    stripped.write_bytes(bytes(header) + data[64:end])
    stripped.chmod(path.stat().st_mode)
    os.replace(stripped, path)
    return len(data) - end
