"""Look at every file of a folder of images before anything is trained on it:
`python -m training.checks FOLDER`.

What would stop a training hours later, or make its accuracy a lie, is said now and with the names
of the files: unreadable images, classes without images, the same picture in two classes or on both
sides of the split. `training.data` calls this and lays out what is left.
"""

import argparse
import hashlib
import json
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from local.atomic import replacing
from local.cli import UserError, run, shown
from local.paths import BUILD
from preprocessing import to_rgb

# What ImageFolder takes, and GIF, of which Pillow gives the first frame.
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
CLUTTER = {"thumbs.db", "desktop.ini", "__macosx"}  # and whatever starts with a dot
FEWEST = 5  # images of a class that is split here: three to learn from, one each for val and test
FEW = 20  # below this a class's accuracy says little
NARROWEST = 100  # long side over short side
NAMED = 5  # files named in one sentence
WHOLE = "all"  # the only part of a folder that is not split yet
CACHE = BUILD / "data" / "checked"

# part ("train", "val", "test", or WHOLE alone) → class → images, sorted
Parts = dict[str, dict[str, list[Path]]]
_REASONS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Checked:
    """The images that can be trained on, and what was noticed on the way, in sentences."""

    parts: Parts
    notes: list[str]


def check_folder(folder: Path, skip_bad: bool = False) -> Checked:
    """Find and check the images of `folder`: one sub-folder a class, or `train`, `val` and `test`
    with one each. Sub-folders of a class belong to it; links are followed.

    Args:
        skip_bad: leave out, and note, the images that would be refused.

    Raises:
        UserError: names what is wrong, and the files.
    """
    parts, notes = list_images(folder)
    return check_images(parts, notes, folder, skip_bad)


def list_images(folder: Path) -> tuple[Parts, list[str]]:
    """The files of each part and class by their names alone, and notes on those left out.

    A folder counts as split if it has `train` and every sub-folder is called train, val, valid,
    validation or test; so a class may be called `train` beside one called `bus`.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {_name(folder)}")
    notes: list[str] = []
    children = _folders(folder)
    names = [child.name.lower() for child in children]
    if "train" in names and set(names) <= PARTS.keys():
        if len({PARTS[name] for name in names}) < len(names):
            raise UserError(f"{_name(folder)} has one part under two names: {', '.join(names)}")
        roots = {PARTS[child.name.lower()]: child for child in children}
    else:
        roots = {WHOLE: folder}
    parts: Parts = {}
    for part, root in sorted(roots.items()):
        loose = [path for path in _files(root, deep=False) if path.suffix.lower() in SUFFIXES]
        if loose:
            notes.append(f"outside the classes' folders, left out: {_names(loose)}")
        parts[part] = {}
        for child in _folders(root):
            files = sorted(_files(child))
            images = [path for path in files if path.suffix.lower() in SUFFIXES]
            others = [path for path in files if path.suffix.lower() not in SUFFIXES]
            if others:
                notes.append(f"not images by their names, left out: {_names(others)}")
            parts[part][child.name] = images
    return parts, notes


def check_images(parts: Parts, notes: list[str], folder: Path, skip_bad: bool = False) -> Checked:
    """Check names, contents and numbers. Arguments and errors as in `check_folder`."""
    _check_classes(parts, folder)
    problems: list[str] = []
    bad: set[Path] = set()
    contents, unreadable = _read_all(parts, folder)
    if unreadable:
        bad |= unreadable.keys()
        reason = next(iter(unreadable.values()))
        problems.append(f"cannot be read as images: {_names(unreadable)} ({reason})")
    problems += _duplicates(parts, contents, bad, notes)
    if problems and not skip_bad:
        advice = "Remove or replace them, or choose to skip such files (--skip-bad, SKIP_BAD)."
        raise UserError(f"{_name(folder)}: {'; '.join(problems)}. {advice}")
    notes += [f"skipped: {problem}" for problem in problems]
    left = {
        part: {name: [path for path in paths if path not in bad] for name, paths in classes.items()}
        for part, classes in parts.items()
    }
    _check_numbers(left, folder, notes)
    return Checked(left, notes)


def table(checked: Checked) -> str:
    """How many images of each class are in each part, as lines of text."""
    parts = [part for part in (WHOLE, "train", "val", "test") if part in checked.parts]
    classes = sorted(checked.parts[parts[0]])
    width = max(len(name) for name in (*classes, "together"))
    lines = [" " * width + "".join(f"{part:>8}" for part in parts)]
    for name in classes:
        numbers = [len(checked.parts[part].get(name, [])) for part in parts]
        lines.append(f"{name:{width}}" + "".join(f"{number:8}" for number in numbers))
    totals = [sum(map(len, checked.parts[part].values())) for part in parts]
    lines.append(f"{'together':{width}}" + "".join(f"{total:8}" for total in totals))
    return "\n".join(lines)


def _check_classes(parts: Parts, folder: Path) -> None:
    """The names must be usable in classes.txt and on every file system, in every part the same."""
    first, *others = parts.values()
    if not first:
        raise UserError(
            f"{_name(folder)} has no sub-folders; it needs one for each class, with its images"
        )
    if len(first) == 1:
        raise UserError(
            f"{_name(folder)} has only one class, {next(iter(first))!r}; a classifier needs two"
        )
    for name in first:
        if not name.isprintable() or name != name.strip():  # surrogates are not printable either
            raise UserError(f"the folder {name!r} cannot be a class: rename it to plain text")
    folded: dict[str, str] = {}
    for name in first:
        key = unicodedata.normalize("NFC", name).casefold()
        if key in folded:
            raise UserError(f"{name!r} and {folded[key]!r} are two folders for one class's name")
        folded[key] = name
    for part, classes in zip(list(parts)[1:], others, strict=True):
        if different := sorted(classes.keys() ^ first.keys()):
            raise UserError(
                f"{_name(folder)}: class {different[0]!r} is not in both {next(iter(parts))} "
                f"and {part}"
            )
    for part, classes in parts.items():
        if empty := [name for name, paths in classes.items() if not paths]:
            where = "" if part == WHOLE else f"{part}: "
            raise UserError(f"{_name(folder)}: {where}class {empty[0]!r} has no images")


def _check_numbers(parts: Parts, folder: Path, notes: list[str]) -> None:
    for part, classes in parts.items():
        # Without a val and a test part, both are cut from this one.
        fewest = FEWEST if part == WHOLE else 3 if part == "train" and len(parts) < 3 else 1
        for name, paths in classes.items():
            if len(paths) < fewest:
                where = _name(folder) if part == WHOLE else f"{_name(folder)}: {part}"
                raise UserError(
                    f"{where}: class {name!r} has {len(paths)} usable images; "
                    f"{fewest} are the least"
                )
    main = parts.get("train") or parts[WHOLE]
    sizes = {name: len(paths) for name, paths in main.items()}
    if few := [name for name, size in sizes.items() if size < FEW]:
        notes.append(f"fewer than {FEW} images to learn from: {_list(few)}")
    if max(sizes.values()) > 10 * min(sizes.values()):
        notes.append(
            f"unbalanced: {max(sizes, key=sizes.get)} has {max(sizes.values())} images, "
            f"{min(sizes, key=sizes.get)} has {min(sizes.values())}"
        )


def _duplicates(
    parts: Parts, contents: dict[Path, str], bad: set[Path], notes: list[str]
) -> list[str]:
    """Problems with pictures that are there more than once; adds those to leave out to `bad`.

    Within one class of one part all but the first are left out, which is only noted. Two classes
    for one picture: all of them are bad. Two parts: those in the part that is learned from are.
    """
    places = defaultdict(list)
    for part in ("test", "val", "train", WHOLE):  # what is measured keeps its picture
        for name, paths in parts.get(part, {}).items():
            for path in paths:
                if path in contents:
                    places[contents[path]].append((part, name, path))
    problems, repeated = [], []
    contradictions, leaks = [], []
    for same in places.values():
        if len(same) == 1:
            continue
        if len({name for _, name, _ in same}) > 1:
            contradictions.append(same)
            bad |= {path for _, _, path in same}
            continue
        if len({part for part, _, _ in same}) > 1:
            leaks.append(same)
        else:
            repeated += [path for _, _, path in same[1:]]
        bad |= {path for _, _, path in same[1:]}
    for what, found in (
        ("the same picture in different classes", contradictions),
        ("the same picture in two parts of the split", leaks),
    ):
        if found:
            first = " and ".join(_name(path) for _, _, path in found[0][:3])
            more = f", and {len(found) - 1} more such pictures" if len(found) > 1 else ""
            problems.append(f"{what}: {first}{more}")
    if repeated:
        notes.append(f"the same picture again in its class, left out: {_names(repeated)}")
    return problems


def _read_all(parts: Parts, folder: Path) -> tuple[dict[Path, str], dict[Path, str]]:
    """SHA-256 of the decoded pixels of each image, and the reasons where there are none.

    What has been decoded once is remembered by path, size and time of change.
    """
    paths = [path for classes in parts.values() for images in classes.values() for path in images]
    memory = CACHE / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]}.json"
    known = _recall(memory)
    stamps = {path: _stamp(path) for path in paths}
    unknown = [path for path in paths if stamps[path] not in known]
    pool = ThreadPoolExecutor(os.cpu_count())  # Pillow decodes without the interpreter lock
    try:
        results = pool.map(_digest, unknown)
        bar = tqdm(results, "checking images", len(unknown), unit="image", disable=not unknown)
        fresh = dict(zip(unknown, bar, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest
    contents, unreadable = {}, {}
    for path in paths:
        digest, reason = known.get(stamps[path]) or fresh[path]
        if reason:
            unreadable[path] = reason
        else:
            contents[path] = digest
    readable = {stamps[path]: (digest, None) for path, digest in contents.items()}
    if readable.keys() - known.keys():
        with replacing(memory) as partial:
            partial.write_text(json.dumps(known | readable))
    return contents, unreadable


def _digest(path: Path) -> tuple[str | None, str | None]:
    try:
        with Image.open(path) as image:
            rgb = to_rgb(image)
            size, pixels = rgb.size, rgb.tobytes()
    except _REASONS as error:
        return None, _reason(path, error)
    if max(size) > NARROWEST * min(size):
        return None, f"{size[0]} x {size[1]} pixels are too narrow"
    return hashlib.sha256(str(size).encode() + pixels).hexdigest(), None


def _reason(path: Path, error: Exception) -> str:
    if path.is_symlink() and not path.exists():
        return "a link to nothing"
    if isinstance(error, Image.UnidentifiedImageError):
        return "empty file" if path.stat().st_size == 0 else "no known format"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _stamp(path: Path) -> str:
    """Names a file and its state; changes with its content. A link is what it points to."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{os.fsencode(path.resolve()).hex()} {status.st_size} {status.st_mtime_ns}"


def _recall(memory: Path) -> dict[str, tuple[str, None]]:
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not _clutter(child))


def _files(folder: Path, deep: bool = True, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """All files but clutter. A link to a folder above, which would not end, is not followed."""
    here = folder.resolve()
    if here in above:
        return
    for child in folder.iterdir():
        if _clutter(child):
            continue
        if not child.is_dir():
            yield child
        elif deep:
            yield from _files(child, deep, above | {here})


def _clutter(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in CLUTTER


def _name(path: Path) -> str:
    """A path that can be printed, whatever bytes it is made of."""
    return shown(path).encode("utf-8", "backslashreplace").decode()


def _names(paths) -> str:
    return _list([_name(path) for path in paths])


def _list(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.checks",
        description="Look at every file of a folder of images before anything is trained on it.",
    )
    parser.add_argument("folder", type=Path, help="one sub-folder a class, or train, val and test")
    parser.add_argument("--skip-bad", action="store_true", help="leave out bad images, and say so")
    args = parser.parse_args()
    checked = check_folder(args.folder, args.skip_bad)
    print(table(checked))
    for note in checked.notes:
        print(note)


if __name__ == "__main__":
    run(main)
