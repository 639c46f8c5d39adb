import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from local.atomic import replacing
from local.cli import UserError
from training.data import NAMES, write_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


def test_every_digit_is_written_once_with_its_value(digits):
    source = load_digits()
    paths = sorted(digits.glob("*/*/*.png"), key=lambda path: path.stem)
    assert [int(path.stem) for path in paths] == list(range(len(source.target)))
    for path, image, label in zip(paths, source.images, source.target, strict=True):
        assert path.parent.name == NAMES[label]
        assert np.abs(np.asarray(Image.open(path)) * (16 / 255) - image).max() < 0.05


def test_the_split_is_stratified(digits):
    for split, share in (("train", 0.6), ("val", 0.2), ("test", 0.2)):
        for name in NAMES:
            whole = len(list(digits.glob(f"*/{name}/*")))
            assert abs(len(list((digits / split / name).iterdir())) - share * whole) < 2


def test_writing_again_changes_nothing_and_elsewhere_gives_the_same(digits, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in digits.rglob("*")}
    assert write_digits(digits) == digits
    assert before == {path: path.stat().st_mtime_ns for path in digits.rglob("*")}
    other = write_digits(tmp_path / "digits")
    for path in digits.glob("*/*/*"):
        assert (other / path.relative_to(digits)).read_bytes() == path.read_bytes()


def test_something_else_in_its_place_is_kept(tmp_path):
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="does not hold the digits"):
        write_digits(tmp_path)
    assert (tmp_path / "diary.txt").read_text() == "mine"


def test_replacing_leaves_the_old_file_on_failure_and_no_rest(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    path = tmp_path / "file"
    code = (
        "import os, signal, sys; from pathlib import Path; from local.atomic import replacing\n"
        "with replacing(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, path], env=environment)
    assert len(list(tmp_path.iterdir())) == 1 and not path.exists()
    with replacing(path) as partial:
        partial.write_text("whole")
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "whole"


def test_a_full_disk_gets_a_sentence_and_the_old_file_stays(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; from local.atomic import replacing\n"
        "path = Path(sys.argv[1], 'file'); path.write_text('old')\n"
        "try:\n"
        "    with replacing(path) as partial:\n"
        "        torch.save(torch.zeros(4_000_000), partial)\n"
        "except BaseException as error:\n"
        "    print(type(error).__name__, error)\n"
        "print(path.read_text(), len(list(path.parent.iterdir())))"
    )
    mount = 'mount -t tmpfs -o size=10m tmpfs "$1" && shift && exec "$@"'
    inside = ["unshare", "-m", "sh", "-c", mount, "sh", tmp_path]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"]).returncode:
        pytest.skip("mounting needs root")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*inside, sys.executable, "-c", code, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("UserError the disk is full: ")
    assert done.stdout.endswith("old 1\n")
