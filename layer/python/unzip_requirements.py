"""Import this first in a Lambda function whose packages come from this layer:

    try:
        import unzip_requirements
    except ImportError:
        pass

PyTorch is larger than the 250 MB that a function and its layers may have unzipped. In this layer
everything is used where it lies, except for the one library that has to be compressed to fit. This
module starts threads that unpack it and returns at once, so that the unpacking hides behind the
handler's other imports; `import torch` waits for the threads when it comes to the point at which
it needs the library, which the dynamic loader then finds because it is loaded already.

The library is unpacked into a folder of its own below $TMPDIR (/tmp on Lambda): beside its final
name under a lock, then renamed, so that a file with the final name is complete, whoever was killed
while writing it. The next process in the same environment checks it and uses it as it is. If that
folder is full or read-only, or belongs to somebody else, the library goes to anonymous memory.

The folder `.requirements` beside this file holds the frames, their index `manifest.json`, the
zstd decoder, and rarely imported pure Python packages as a zip, which goes to the end of sys.path.
All of them carry checksums. A layer that is damaged or made for another Python makes
`import torch` raise an ImportError that says so.
UNZIP_REQUIREMENTS_TO=memory in the function's environment leaves /tmp alone.
"""

import contextlib
import ctypes
import fcntl
import gc
import importlib.util
import json
import mmap
import os
import sys
import threading
import zlib
from importlib.machinery import PathFinder, SourceFileLoader

HERE = os.path.dirname(os.path.abspath(__file__))
REQUIREMENTS = os.path.join(HERE, ".requirements")
ARCHIVE = os.path.join(REQUIREMENTS, "archive.zip")


class Damaged(Exception):
    """The layer's own files are not what the builder wrote."""

    def __init__(self, path: str, reason: object):
        super().__init__(f"the layer is damaged: {path}: {reason}; publish it again")


class Library:
    """One compressed shared library: unpacked and loaded by a thread, awaited by `wait`."""

    def __init__(self, entry: dict, zstd, archive_crc32: int):
        self.entry, self.zstd, self.archive_crc32 = entry, zstd, archive_crc32
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, name="unzip_requirements", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        self.thread.join()
        if self.error:
            raise ImportError(f"unzip_requirements: {self.error}") from self.error

    def _run(self) -> None:
        try:
            check(ARCHIVE, self.archive_crc32)
            path = self._unpack()
            for needed in self.entry["needs"]:
                load(os.path.join(HERE, needed))
            load(path)
        except Exception as error:
            self.error = error

    def _unpack(self) -> str:
        """Returns the path under which the dynamic loader finds the unpacked library."""
        if os.environ.get("UNZIP_REQUIREMENTS_TO") != "memory":
            try:
                return self._unpack_to_disk()
            except OSError as error:
                reason = f"{error.filename or temporary_folder()}: {error.strerror}"
                print(f"unzip_requirements: {reason}; unpacking to memory", file=sys.stderr)
        # The descriptor stays open: debuggers and a later fork read the library through it.
        fd = os.memfd_create(os.path.basename(self.entry["path"]), os.MFD_CLOEXEC)
        self._write_frames(fd)
        return f"/proc/self/fd/{fd}"

    def _unpack_to_disk(self) -> str:
        folder = os.path.join(
            temporary_folder(), f"requirements-{os.getuid()}-{self.entry['sha256'][:16]}"
        )
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(directory).st_uid != os.getuid():
                raise PermissionError(1, "belongs to another user", folder)
            fcntl.flock(directory, fcntl.LOCK_EX)
            path = os.path.join(folder, os.path.basename(self.entry["path"]))
            if self._intact(path):
                return path
            partial = path + ".partial"
            fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            try:
                self._write_frames(fd)
                os.replace(partial, path)
            except BaseException:
                os.unlink(partial)
                raise
            finally:
                os.close(fd)
            return path
        finally:
            os.close(directory)  # and with it the lock

    def _intact(self, path: str) -> bool:
        """Whether the library is there, as an earlier process left it: its checksums say so."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False

        def check(_, start: int, compressed: int, position: int, size: int, crc32: int) -> None:
            with mmap.mmap(fd, size, offset=position, access=mmap.ACCESS_READ) as unpacked:
                if zlib.crc32(unpacked) != crc32:
                    raise ValueError("it has been changed")

        try:
            if os.fstat(fd).st_size == self.entry["size"]:
                self._for_each_frame(check)
                return True
        except ValueError:
            pass
        finally:
            os.close(fd)
        print(f"unzip_requirements: {path} has been changed; unpacking again", file=sys.stderr)
        return False

    def _write_frames(self, fd: int) -> None:
        """Decompresses all frames to their places in the file.

        Straight into the mapped file, one call a frame: each return to Python would wait for the
        interpreter lock, which the handler's imports hold. Large writes cost twice the time.
        """
        os.posix_fallocate(fd, 0, self.entry["size"])  # a full disk is an error here, no SIGBUS
        source = os.path.join(REQUIREMENTS, self.entry["frames"])

        def write(zstd, start: int, compressed: int, position: int, size: int, crc32: int) -> None:
            frame = view[start : start + compressed]
            with (
                zstd.stream_reader(frame) as reader,
                mmap.mmap(fd, size, offset=position) as target,
            ):
                # Without readahead the page cache keeps single pages; in large ones, every touch
                # of the library would count for two megabytes of memory.
                target.madvise(mmap.MADV_RANDOM)
                if reader.readinto(target) != size or reader.read(1):
                    raise ValueError("a frame has another length")

        try:
            with (
                open(source, "rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
                memoryview(mapped) as view,
            ):
                self._for_each_frame(write)
        except (ValueError, self.zstd.ZstdError) as error:
            raise Damaged(source, error) from None

    def _for_each_frame(self, work) -> None:
        """Calls `work` with each frame's entry in the index, on every core there is.

        Each core has one decompressor, because that keeps its window of 16 MB.
        """
        frames = iter(self.entry["index"])
        errors: list[Exception] = []

        def run() -> None:
            decompressor = self.zstd.ZstdDecompressor()
            try:
                for frame in frames:
                    work(decompressor, *frame)
            except Exception as error:
                errors.append(error.with_traceback(None))  # which would hold on to the mapping

        threads = [threading.Thread(target=run) for _ in range(cores() - 1)]
        for thread in threads:
            thread.start()
        run()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


class Finder:
    """Makes `import torch` wait for its library at the moment it needs it."""

    def __init__(self, libraries: dict[str, Library]):
        self.libraries = libraries

    def find_spec(self, name, path=None, target=None):
        if name in self.libraries:
            self.libraries[name].wait()
        elif name == "torch":
            spec = PathFinder.find_spec(name, path, target)
            if spec and type(spec.loader) is SourceFileLoader:
                spec.loader = TorchLoader(name, spec.loader.path)
            return spec
        return None


class Refusal:
    """Handlers pass over an ImportError of this module, so that `import torch` has to say it."""

    def __init__(self, reason: str):
        self.reason = reason

    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ImportError(f"unzip_requirements: {self.reason}")
        return None


class TorchLoader(SourceFileLoader):
    """Lets torch find its rarely imported subpackages in the archive, and loads it without garbage
    collection: `import torch` makes some hundred thousand objects that all stay, and a sixth of
    its time went to looking for garbage among them. Frozen, nobody looks at them again."""

    def exec_module(self, module):
        enabled = gc.isenabled()
        gc.disable()
        try:
            module.__path__.append(os.path.join(ARCHIVE, "torch"))
            super().exec_module(module)
        finally:
            gc.freeze()
            if enabled:
                gc.enable()


def temporary_folder() -> str:
    # Not tempfile.gettempdir(): when /tmp is full, that falls back to the working directory.
    return os.environ.get("TMPDIR") or "/tmp"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load(path: str) -> None:
    """dlopen without the global interpreter lock, which ctypes.CDLL would hold meanwhile."""
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    if not dlopen(os.fsencode(path), os.RTLD_NOW):
        ctypes.CDLL(path)  # raises with the loader's own words


def check(path: str, crc32: int) -> None:
    # Mapped, not read: a large block that was freed makes malloc hold on to more later.
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if zlib.crc32(content) != crc32:
            raise Damaged(path, "it fails its checksum")


def start() -> list:
    """What is put in front of sys.meta_path: the threads are running, or `import torch` refuses."""
    path = os.path.join(REQUIREMENTS, "manifest.json")
    try:
        with open(path + ".crc32", encoding="ascii") as file:
            check(path, int(file.read(), 16))
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        runtime = f"python{sys.version_info.major}.{sys.version_info.minor}"
        if manifest["runtime"] != runtime:
            return [Refusal(f"this layer is for {manifest['runtime']}, not {runtime}")]
        decoder = os.path.join(REQUIREMENTS, manifest["decoder"])
        check(decoder, manifest["crc32"][manifest["decoder"]])
        spec = importlib.util.spec_from_file_location("backend_c", decoder)
        zstd = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(zstd)
        archive_crc32 = manifest["crc32"]["archive.zip"]
        libraries = {
            entry["needed_by"]: Library(entry, zstd, archive_crc32)
            for entry in manifest["libraries"]
        }
    except Damaged as error:
        return [Refusal(str(error))]
    except (OSError, ValueError, ImportError) as error:
        return [Refusal(str(Damaged(path, error)))]
    sys.path.append(ARCHIVE)
    return [Finder(libraries)]


sys.meta_path[:0] = start()
