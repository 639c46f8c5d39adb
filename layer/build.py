"""Builds the Lambda layer: `python -m layer.build`, called by create_layer_zipfile.sh.

Install the pinned packages, prune, strip, compile, compress what does not fit, prove in a clean
interpreter that the result works, and only then write the zip: a build that fails leaves the last
good zip alone. The same inputs give the same bytes. What is pruned and why is in rules.py; how the
layer starts is in python/unzip_requirements.py; docs/layer.md explains both with measurements.
"""

import argparse
import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import zstandard

from layer import rules
from layer.budget import UNZIPPED_LIMIT, table
from layer.elf import needed, strip
from layer.packages import (
    REQUIREMENTS,
    Target,
    container_packages,
    digest,
    install_packages,
    only_one,
    pip,
    say,
    serving_packages,
    versions,
)
from local.atomic import replacing
from local.cli import UserError, run, shown
from local.paths import BUILD, ROOT

SOURCE = ROOT / "layer"
DECODER = "zstandard==0.25.0"  # only its compiled module goes into the layer
FRAME = 16 << 20  # bytes of a library in one zstd frame: the unit of parallel decompression
# Between zstd's levels 9 (84 MB, 10 s) and 19 (75 MB, 3 min): 78 MB in 90 s of one core. Machine
# code repeats itself in matches of three bytes, which the levels below 17 do not look for.
ZSTD = {
    "strategy": zstandard.STRATEGY_BTOPT,
    "window_log": 24,
    "chain_log": 22,
    "hash_log": 22,
    "search_log": 3,
    "min_match": 3,
    "target_length": 32,
}
RESERVED = 12_000_000  # bytes left for the function's own code below the limit for everything
TMP = 512  # MB of 2^20 bytes: Lambda's default for /tmp, and the most that SnapStart allows
MAX_TMP = (
    10_240  # https://docs.aws.amazon.com/lambda/latest/dg/configuration-ephemeral-storage.html
)
DATE = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can say


def build(
    target: Target,
    requirements: Path = REQUIREMENTS,
    output: Path | None = None,
    packages: Path | None = None,
    ephemeral_storage: int = TMP,
) -> Path:
    """Builds the layer unless `output` was built from the same inputs; returns its path.

    `packages`: a folder filled by pip or `sam build` elsewhere, instead of installing them here.
    `ephemeral_storage`: MB of /tmp that the function will have.
    Raises UserError with a sentence.
    """
    output = output or SOURCE / default_name(requirements)
    with only_one():
        inputs = digest(
            requirements.read_bytes(), target.name, os.environ.get("TORCH_INDEX_URL", ""),
            str(packages), *(path.read_bytes() for path in sources()),
        )  # fmt: skip
        manifest = read_manifest(output)
        if manifest and manifest["inputs"] == inputs and packages is None:
            say(f"{shown(output)} is up to date.")
        else:
            manifest = make(target, requirements, output, packages, inputs, ephemeral_storage)
        check_limits(manifest["budget"], ephemeral_storage)
        report(manifest, output)
    return output


def make(
    target: Target,
    requirements: Path,
    output: Path,
    packages: Path | None,
    inputs: str,
    ephemeral_storage: int,
) -> dict:
    started = time.monotonic()
    packages = packages or install_packages(target, requirements)
    (BUILD / "layer").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD / "layer", prefix="stage-") as folder:
        stage = Path(folder) / "python"
        original = {n: s for n, s in sizes(packages).items() if not matches(n, rules.GENERATED)}
        prune(packages, stage)
        strip_libraries(stage)
        archived = archive(stage)
        shutil.copy(SOURCE / "python" / "unzip_requirements.py", stage)
        compile_bytecode(stage, target)
        libraries = compress(stage)
        decoder = add_decoder(stage, target)
        check_libraries(stage)
        manifest = {
            "inputs": inputs,
            "target": target.name,
            "runtime": target.runtime,
            "architecture": target.architecture,
            "packages": versions(packages),
            "decoder": decoder,
            "libraries": libraries,
        }
        manifest["budget"] = budget(stage, original, archived, manifest)
        write_manifest(stage / ".requirements", manifest)
        check_limits(manifest["budget"], ephemeral_storage)
        smoke_test(stage, target)
        write_zip(stage, output)
    say(f"Built in {time.monotonic() - started:.0f} s.")
    return read_manifest(output) or {}


def default_name(requirements: Path) -> str:
    """The reference name of a layer with this torch: pytorch-2.13.0-lambda-layer.zip."""
    for line in requirements.read_text(encoding="utf-8").splitlines():
        if line.startswith("torch=="):
            return f"pytorch-{line.split('#')[0].split('==')[1].strip()}-lambda-layer.zip"
    return "pytorch-lambda-layer.zip"


def sources() -> Iterator[Path]:
    """The files that decide what a layer looks like."""
    names = ["build.py", "elf.py", "packages.py", "rules.py", "python/unzip_requirements.py"]
    yield from (SOURCE / name for name in names)


def files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def sizes(folder: Path) -> dict[str, int]:
    return {name: path.stat().st_size for name, path in files(folder)}


def matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def prune(packages: Path, stage: Path) -> None:
    """Hard-links what inference needs to the stage: the installed packages stay as they are."""
    say("Pruning what inference never needs")
    keep = [pattern for pattern, _ in rules.KEEP]
    drop = [pattern for pattern, _ in rules.PRUNE] + rules.GENERATED
    for name, path in files(packages):
        if matches(name, keep) or not matches(name, drop):
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, stage / name)


def strip_libraries(stage: Path) -> None:
    saved = sum(strip(path) for name, path in files(stage) if matches(name, rules.STRIP))
    say(f"Stripped {saved / 1e6:.0f} MB of symbols from torch's libraries")


def archive(stage: Path) -> dict[str, int]:
    """Moves rarely imported pure Python into one zip; returns its share in it per package."""
    (stage / ".requirements").mkdir()
    stored: dict[str, int] = {}
    with zipfile.ZipFile(stage / ".requirements" / "archive.zip", "w") as file:
        for name, path in list(files(stage)):
            if matches(name, rules.ARCHIVE):
                entry = zip_entry(name)
                file.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED, 9)
                package = name.split("/")[0]
                stored[package] = stored.get(package, 0) + entry.compress_size
                path.unlink()
    for folder in sorted((p for p in stage.rglob("*") if p.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    return stored


def compile_bytecode(stage: Path, target: Target) -> None:
    """Adds .pyc files that are never checked against the source: unzipping loses timestamps, and
    a read-only layer could never replace a stale one."""
    interpreter = target.interpreter()
    if interpreter is None:
        say(
            f"No python{target.python} was found to compile with: the layer has no .pyc files, and "
            "every cold start takes 2 to 3 s longer. Install it and build again."
        )
        return
    say(f"Compiling bytecode with {target.runtime}")
    names = [
        name
        for name, _ in files(stage)
        if name.endswith(".py")
        and (matches(name, rules.BYTECODE_ALL_THE_SAME) or not matches(name, rules.NO_BYTECODE))
    ]
    script = (
        "import py_compile, sys\n"
        "mode = py_compile.PycInvalidationMode.UNCHECKED_HASH\n"
        "for name in sys.stdin.read().splitlines():\n"
        "    try:\n"
        "        py_compile.compile(name, dfile='/opt/python/' + name, doraise=True,\n"
        "                           invalidation_mode=mode)\n"
        "    except (SyntaxError, py_compile.PyCompileError) as error:\n"
        "        print(name, file=sys.stderr)\n"  # such as templates: they stay as source
    )
    subprocess.run(
        [interpreter, "-I", "-S", "-W", "ignore", "-c", script],
        input="\n".join(names), cwd=stage, text=True, check=True, capture_output=True,
    )  # fmt: skip


def compress(stage: Path) -> list[dict]:
    """Replaces the libraries of rules.COMPRESS by independent zstd frames with checksums."""
    entries = []
    names = [name for name, _ in files(stage)]
    by_basename = {name.rsplit("/", 1)[-1]: name for name in names}
    for pattern, needed_by in rules.COMPRESS:
        for name in fnmatch.filter(names, pattern):
            library = stage / name
            # Unpacked elsewhere, it finds no neighbours: they have to be loaded before it.
            needs = neighbours(stage, name, by_basename)
            data = library.read_bytes()
            frames = compressed(data, library.name)
            target = stage / ".requirements" / f"{library.name}.zst"
            target.write_bytes(b"".join(frames))
            library.unlink()
            index, position = [], 0
            for start, frame in zip(range(0, len(data), FRAME), frames, strict=True):
                content = data[start : start + FRAME]
                index.append([position, len(frame), start, len(content), zlib.crc32(content)])
                position += len(frame)
            entries.append(
                {
                    "path": name,
                    "size": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "frames": target.name,
                    # [offset, bytes] in the frames, [offset, bytes, CRC-32] unpacked
                    "index": index,
                    "needed_by": needed_by,
                    "needs": needs,
                }
            )
    return entries


def neighbours(stage: Path, name: str, by_basename: dict[str, str]) -> list[str]:
    """The libraries of the layer that a library needs, each after those that it needs itself.

    A path to look in (DT_RPATH) is inherited, so that the second row may lack one of its own.
    """
    found: dict[str, None] = {}

    def visit(library: str) -> None:
        for need in needed(stage / library):
            neighbour = by_basename.get(need)
            if neighbour and neighbour not in found:
                visit(neighbour)
                found[neighbour] = None

    visit(name)
    return list(found)


def compressed(data: bytes, name: str) -> list[bytes]:
    """The zstd frames of a library, kept from an earlier build if it compressed the same bytes."""
    parameters = zstandard.ZstdCompressionParameters(write_checksum=True, **ZSTD)
    key = digest(data, repr(ZSTD), str(FRAME), repr(zstandard.ZSTD_VERSION))
    kept = BUILD / "layer" / f"frames-{key}"
    if not kept.is_file():
        say(f"Compressing {name}: about a minute on two cores")
        started = time.monotonic()

        def frame(start: int) -> bytes:
            compressor = zstandard.ZstdCompressor(compression_params=parameters)
            return compressor.compress(data[start : start + FRAME])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            frames = []
            for result in pool.map(frame, range(0, len(data), FRAME)):
                frames.append(result)
                if sys.stderr.isatty():
                    done = min(1, len(frames) * FRAME / len(data))
                    print(f"\r  {done:.0%} ", end="", file=sys.stderr, flush=True)
        size, seconds = sum(map(len, frames)), time.monotonic() - started
        say(f"  {len(data) / 1e6:.0f} MB to {size / 1e6:.0f} MB in {seconds:.0f} s")
        lengths = b"".join(len(frame).to_bytes(8, "big") for frame in frames)
        with replacing(kept) as partial:
            partial.write_bytes(lengths + b"".join(frames))
    stored = kept.read_bytes()
    count = -(-len(data) // FRAME)
    frames, position = [], 8 * count
    for i in range(count):
        length = int.from_bytes(stored[8 * i : 8 * i + 8], "big")
        frames.append(stored[position : position + length])
        position += length
    return frames


def add_decoder(stage: Path, target: Target) -> str:
    """Puts the compiled half of the zstandard wheel for the target into the layer."""
    folder = BUILD / "layer" / f"decoder-{target.name}-{DECODER.split('==')[1]}"
    if not folder.is_dir():
        with replacing(folder) as partial:
            arguments = ["--no-deps", "--target", str(partial), *target.pip_arguments(), DECODER]
            failure = f"The decoder {DECODER} cannot be installed for {target.name}"
            pip(["install", *arguments], failure, target)
    (module,) = (folder / "zstandard").glob("backend_c.*.so")
    shutil.copy(module, stage / ".requirements")
    strip(stage / ".requirements" / module.name)
    return module.name


def package_of(name: str) -> str:
    """The package whose budget a file counts for, by its first folder."""
    parts = name.split("/")
    first = parts[1].split(".")[0] if parts[0] == "__pycache__" else parts[0].removesuffix(".py")
    first = first.split("-")[0] if first.endswith("-info") else first
    first = first.removesuffix(".libs")
    return {"PIL": "pillow", "_distutils_hack": "setuptools", "_yaml": "pyyaml"}.get(first, first)


def budget(stage: Path, original: dict[str, int], archived: dict[str, int], manifest: dict) -> dict:
    """Bytes per package: kept in place, compressed (as stored), and pruned or stripped."""
    rows: dict[str, dict[str, int]] = {}

    def row(package: str) -> dict[str, int]:
        return rows.setdefault(package, {"kept": 0, "compressed": 0, "pruned": 0})

    staged = sizes(stage)
    for name, size in staged.items():
        if not name.startswith(".requirements/") and "unzip_requirements" not in name:
            row(package_of(name))["kept"] += size
    for entry in manifest["libraries"]:
        row(package_of(entry["path"]))["compressed"] += sum(frame[1] for frame in entry["index"])
    for package, size in archived.items():
        row(package)["compressed"] += size
    unpacked = {entry["path"]: entry["size"] for entry in manifest["libraries"]}
    for name, size in original.items():
        if not matches(name, rules.ARCHIVE) or matches(name, [p for p, _ in rules.PRUNE]):
            row(package_of(name))["pruned"] += size - staged.get(name, unpacked.get(name, 0))
    accounted = sum(r["kept"] + r["compressed"] for r in rows.values())
    own = row("unzip_requirements")
    own["kept"] = sum(staged.values()) - accounted
    for numbers in rows.values():
        numbers["share"] = (numbers["kept"] + numbers["compressed"]) / UNZIPPED_LIMIT
    return {
        "target": manifest["target"],
        "limit": UNZIPPED_LIMIT,
        "unzipped": sum(staged.values()),
        "extracted": sum(unpacked.values()),
        "packages": dict(
            sorted(rows.items(), key=lambda item: -(item[1]["kept"] + item[1]["compressed"]))
        ),
    }


def write_manifest(folder: Path, manifest: dict) -> None:
    """With checksums of its neighbours in it, and its own beside it."""
    checked = {name: (folder / name).read_bytes() for name in (manifest["decoder"], "archive.zip")}
    crc32s = {name: zlib.crc32(content) for name, content in checked.items()}
    write_json(folder / "manifest.json", manifest | {"crc32": crc32s})
    crc32 = zlib.crc32((folder / "manifest.json").read_bytes())
    (folder / "manifest.json.crc32").write_text(f"{crc32:08x}\n", encoding="ascii")


def check_libraries(stage: Path) -> None:
    """Raises UserError if a shared library needs one that neither the layer nor Lambda has.

    The smoke test would say so as well, where it can run.
    """
    found = dict(files(stage))
    here = {name.rsplit("/", 1)[-1] for name in found} | {
        Path(library).name for library, _ in rules.COMPRESS
    }
    for name, path in found.items():
        for library in needed(path):
            if library not in here and not matches(library, rules.SYSTEM_LIBRARIES):
                raise UserError(
                    f"{name} needs {library}, which is neither in the layer nor in Lambda's "
                    "runtime: its package has no wheel for Lambda, or layer/rules.py prunes it."
                )


def check_limits(numbers: dict, ephemeral_storage: int) -> None:
    if numbers["unzipped"] + RESERVED > numbers["limit"]:
        largest = ", ".join(list(numbers["packages"])[:4])
        raise UserError(
            f"The layer would have {numbers['unzipped']:,} bytes unzipped; with {RESERVED:,} for "
            f"the function's own code that is over Lambda's {numbers['limit']:,}. The largest "
            f"packages are {largest}."
        )
    limit = ephemeral_storage << 20
    if numbers["extracted"] > limit:
        raise UserError(
            f"The layer would unpack {numbers['extracted']:,} bytes at the cold start, over the "
            f"{limit:,} of /tmp. Lambda gives {TMP} MB by default and {MAX_TMP} at most "
            f"(--ephemeral-storage), with SnapStart {TMP}."
        )


def smoke_test(stage: Path, target: Target) -> None:
    """Imports and predicts from the stage in a clean interpreter with nothing else on its path."""
    runner = target.runner()
    if runner is None:
        say(
            f"The smoke test is skipped: {target.name} cannot run here (--emulator runs it all the "
            "same)."
        )
        return
    say("Smoke test: import and predict in a clean interpreter")
    with tempfile.TemporaryDirectory() as scratch:
        result = subprocess.run(
            [*runner, "-I", "-S", "-B", str(SOURCE / "smoke_test.py"), str(stage)],
            env={"TMPDIR": scratch, "PATH": os.environ["PATH"]},
            capture_output=True, text=True,
        )  # fmt: skip
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"The layer does not work, so it is not written: {last}")
    missing = json.loads(result.stdout.splitlines()[-1])["without_bytecode"]
    if missing:
        say(f"  {len(missing)} modules are imported without bytecode: {', '.join(missing)}")


def zip_entry(name: str, mode: int = 0o644) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, DATE)
    entry.create_system = 3
    entry.external_attr = (0o100000 | mode) << 16
    return entry


def write_zip(stage: Path, output: Path) -> None:
    say(f"Writing {shown(output)}")
    with replacing(output) as partial, zipfile.ZipFile(partial, "w") as file:
        for name, path in files(stage):
            mode = 0o755 if os.access(path, os.X_OK) else 0o644
            stored = path.suffix == ".zst" or name == ".requirements/archive.zip"
            method = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
            file.writestr(zip_entry(f"python/{name}", mode), path.read_bytes(), method, 9)


def read_manifest(zip_path: Path) -> dict | None:
    """The manifest inside a layer's zip, with the zip's own size; None if it is no such zip."""
    try:
        with zipfile.ZipFile(zip_path) as file:
            manifest = json.loads(file.read("python/.requirements/manifest.json"))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    manifest["budget"]["zipped"] = zip_path.stat().st_size
    return manifest


def report(manifest: dict, output: Path) -> None:
    write_json(BUILD / "layer" / "budget.json", manifest["budget"])
    print(table(manifest["budget"]))
    print(shown(output))


def write_json(path: Path, value: dict) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="layer.build", description="Build the Lambda layer with PyTorch."
    )
    parser.add_argument(
        "--target", choices=["local", "aws"], help="default: $LAYER_TARGET or local"
    )
    parser.add_argument("--python", help="version for --target aws (default 3.13)")
    parser.add_argument("--architecture", choices=["x86_64", "arm64"], help="for --target aws")
    parser.add_argument(
        "--emulator", default="", metavar="COMMAND",
        help="runs the target's Python for the smoke test, if it cannot run here: "
        "'qemu-aarch64 -L ROOT ROOT/usr/bin/python3.13'",
    )  # fmt: skip
    parser.add_argument(
        "--ephemeral-storage", type=int, default=TMP, metavar="MB",
        help="/tmp of the function that the layer is for (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--snapstart", action="store_true",
        help=f"it is for a function with SnapStart, which allows {TMP} MB of /tmp",
    )  # fmt: skip
    parser.add_argument("--requirements", type=Path, default=REQUIREMENTS, metavar="FILE")
    parser.add_argument("--output", type=Path, metavar="ZIP")
    parser.add_argument(
        "--packages-only", action="store_true",
        help="only install the packages, unpruned, and print their folder",
    )  # fmt: skip
    parser.add_argument(
        "--use-container", action="store_true",
        help="install the packages by `sam build --use-container` (Docker)",
    )  # fmt: skip
    options = parser.parse_args()
    if not TMP <= options.ephemeral_storage <= MAX_TMP:
        parser.error(f"--ephemeral-storage must be from {TMP} to {MAX_TMP}")
    if options.snapstart and options.ephemeral_storage > TMP:
        parser.error(f"with SnapStart, --ephemeral-storage is at most {TMP}")
    target = Target.create(options.target, options.python, options.architecture, options.emulator)
    if options.packages_only:
        print(serving_packages(target, options.requirements))
    else:
        packages = None
        if options.use_container:
            packages = container_packages(target, options.requirements)
        build(target, options.requirements, options.output, packages, options.ephemeral_storage)


if __name__ == "__main__":
    run(main)
