"""The module at the top of every handler, on a small layer made by the real builder's code."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import zstandard

from layer import build, elf

SOURCE = Path(build.__file__).parent / "python" / "unzip_requirements.py"
DECODER = Path(zstandard.backend_c.__file__).name
LOAD = "import unzip_requirements, torch; print(torch.answer)"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A layer whose `torch` has one compressed library of 50 MB, in four frames."""
    folder = tmp_path_factory.mktemp("layer")
    stage = folder / "python"
    library = stage / "torch" / "lib" / "libtorch_cpu.so"
    library.parent.mkdir(parents=True)
    decoder = Path(zstandard.backend_c.__file__)
    # Any shared library will do; the loader ignores what follows it.
    padding = random.Random(0).randbytes(1 << 20) * 40 + bytes(10 << 20)
    library.write_bytes(decoder.read_bytes() + padding)
    (stage / "torch" / "__init__.py").write_text("import torch._C\nanswer = torch._C.answer\n")
    (stage / "torch" / "_C.py").write_text("answer = 42\n")
    shutil.copy(SOURCE, stage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "BUILD", folder / "build")
        patch.setitem(build.ZSTD, "strategy", zstandard.STRATEGY_FAST)
        (folder / "build" / "layer").mkdir(parents=True)
        (stage / ".requirements").mkdir()
        libraries = build.compress(stage)
    shutil.copy(decoder, stage / ".requirements")
    with zipfile.ZipFile(stage / ".requirements" / "archive.zip", "w") as file:
        file.writestr("archived.py", "answer = 43\n")
    build.write_manifest(
        stage / ".requirements",
        {"decoder": decoder.name, "libraries": libraries, "runtime": build.Target.create().runtime},
    )
    return stage, libraries[0]


@pytest.fixture
def layer(original, tmp_path):
    shutil.copytree(original[0], tmp_path / "python")
    (tmp_path / "tmp").mkdir()
    return tmp_path


def command(layer, code=LOAD):
    return [
        sys.executable,
        "-I",
        "-S",
        "-c",
        f"import sys; sys.path.insert(0, '{layer}/python'); {code}",
    ]


def start(layer, code=LOAD, **environment):
    return subprocess.Popen(
        command(layer, code), env={"TMPDIR": str(layer / "tmp")} | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(layer, code=LOAD, **environment):
    process = start(layer, code, **environment)
    out, err = process.communicate(timeout=60)
    return process.returncode, out.strip(), err


def unpacked(layer):
    return sorted(p for p in (layer / "tmp").rglob("*") if p.is_file())


def assert_whole(layer, entry):
    (path,) = unpacked(layer)
    assert path.name == "libtorch_cpu.so"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]


def test_torch_on_the_next_line_waits_for_its_library(layer, original):
    assert run(layer) == (0, "42", "")
    assert_whole(layer, original[1])


def test_the_import_returns_before_the_library_is_there(layer):
    code = (
        "import unzip_requirements as u; "
        "print([f.thread.is_alive() for m in sys.meta_path if isinstance(m, u.Finder) "
        "for f in m.libraries.values()])"
    )
    assert run(layer, code)[1] == "[True]"


def test_a_warm_restart_does_not_unpack_again(layer):
    assert run(layer)[0] == 0
    (before,) = unpacked(layer)
    stat = before.stat()
    assert run(layer) == (0, "42", "")
    (after,) = unpacked(layer)
    assert (after.stat().st_ino, after.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_killed_at_any_instant_the_next_start_recovers(layer, original):
    delays = random.Random(1)
    for _ in range(15):
        process = start(layer)
        time.sleep(delays.uniform(0, 0.15))
        process.kill()
        process.communicate()
    assert run(layer) == (0, "42", "")
    assert_whole(layer, original[1])


@pytest.mark.parametrize("name", ["libtorch_cpu.so.partial", "libtorch_cpu.so"])
def test_a_half_written_file_is_replaced(layer, original, name):
    run(layer)
    (path,) = unpacked(layer)
    half = path.read_bytes()[: 20 << 20]
    path.unlink()
    path.with_name(name).write_bytes(half)
    assert run(layer)[:2] == (0, "42")
    assert_whole(layer, original[1])


def test_several_processes_at_once(layer, original):
    processes = [start(layer) for _ in range(5)]
    assert [(*p.communicate(timeout=60), p.returncode) for p in processes] == [("42\n", "", 0)] * 5
    assert_whole(layer, original[1])


def flip(path: Path, position: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 0x10
    path.write_bytes(data)


OWN_FILES = ["libtorch_cpu.so.zst", "manifest.json", "manifest.json.crc32", "archive.zip", DECODER]


@pytest.mark.parametrize("name", OWN_FILES)
@pytest.mark.parametrize("position", [0.001, 0.3, 0.7, 0.95])
def test_a_flipped_byte_is_refused_with_a_sentence(layer, name, position):
    flip(layer / "python" / ".requirements" / name, position)
    code, _, err = run(layer)
    assert code == 1
    assert "ImportError: unzip_requirements: the layer is damaged" in err.splitlines()[-1]
    assert unpacked(layer) == []


@pytest.mark.parametrize("name", OWN_FILES)
def test_a_missing_file_is_refused_with_a_sentence(layer, name):
    (layer / "python" / ".requirements" / name).unlink()
    code, _, err = run(layer)
    assert code == 1
    assert "ImportError: unzip_requirements: " in err.splitlines()[-1]
    assert name in err.splitlines()[-1]


@pytest.mark.parametrize("position", [0, 0.5, 0.999999])
def test_a_byte_flipped_in_tmp_is_unpacked_again(layer, original, position):
    run(layer)
    (path,) = unpacked(layer)
    flip(path, position)
    code, out, err = run(layer)
    assert (code, out) == (0, "42")
    assert "has been changed; unpacking again" in err
    assert_whole(layer, original[1])


def test_missing_frames_are_refused_with_a_sentence(layer):
    frames = layer / "python" / ".requirements" / "libtorch_cpu.so.zst"
    frames.write_bytes(frames.read_bytes()[:1000])
    code, _, err = run(layer)
    assert code == 1 and "the layer is damaged" in err.splitlines()[-1]


def test_the_wrong_python_is_refused_with_a_sentence(layer):
    folder = layer / "python" / ".requirements"
    manifest = json.loads((folder / "manifest.json").read_text())
    build.write_manifest(folder, manifest | {"runtime": "python3.9"})
    code, _, err = run(layer)
    assert code == 1
    assert "this layer is for python3.9" in err.splitlines()[-1]


def test_without_a_usable_tmp_the_library_goes_to_memory(layer):
    code, out, err = run(layer, TMPDIR=str(layer / "nowhere"))
    assert (code, out) == (0, "42")
    assert "unpacking to memory" in err and "No such file" in err


def test_a_link_planted_in_tmp_is_not_followed(layer):
    run(layer)
    (path,) = unpacked(layer)
    elsewhere = layer / "elsewhere"
    path.parent.rename(elsewhere)
    path.parent.symlink_to(elsewhere)
    code, out, err = run(layer)
    assert (code, out) == (0, "42") and "unpacking to memory" in err


def test_memory_can_be_asked_for(layer):
    assert run(layer, UNZIP_REQUIREMENTS_TO="memory") == (0, "42", "")
    assert unpacked(layer) == []


def mounted(layer, options):
    """Runs in a mount namespace of its own with $TMPDIR on a tmpfs with these options."""
    tmp = layer / "tmp"
    unshare = shutil.which("unshare")
    script = f'mount -t tmpfs -o {options} tmpfs "{tmp}" && exec "$@"'
    inside = [unshare or "unshare", "-m", "sh", "-c", script, "sh"]
    if not unshare or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    return subprocess.run(
        [*inside, *command(layer)], env={"TMPDIR": str(tmp), "PATH": os.environ["PATH"]},
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options, reason", [("size=10m", "No space left"), ("ro", "Read-only file system")]
)
def test_full_and_read_only_tmp(layer, options, reason):
    result = mounted(layer, options)
    assert (result.returncode, result.stdout) == (0, "42\n")
    assert reason in result.stderr and "unpacking to memory" in result.stderr


def test_garbage_collection_is_on_after_the_import(layer):
    code = "import gc, unzip_requirements, torch; print(gc.isenabled(), gc.get_freeze_count() > 0)"
    assert run(layer, code)[1] == "True True"


def test_other_modules_are_left_alone(layer):
    assert run(layer, "import unzip_requirements, csv; print(csv.__name__)")[1] == "csv"


def test_strip_leaves_what_is_loaded(tmp_path):
    library = tmp_path / "library.so"
    shutil.copy(zstandard.backend_c.__file__, library)
    saved = elf.strip(library)
    assert saved > 0
    assert library.stat().st_size + saved == Path(zstandard.backend_c.__file__).stat().st_size
    assert elf.strip(library) == 0
    code = f"import ctypes; ctypes.CDLL('{library}').PyInit_backend_c"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_strip_leaves_other_files_alone(tmp_path):
    path = tmp_path / "script.so"
    path.write_bytes(b"INPUT(libother.so)")
    assert elf.strip(path) == 0
    assert path.read_bytes() == b"INPUT(libother.so)"
