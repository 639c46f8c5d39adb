"""What is said about a folder of images before anything is trained on it."""

import os
import shutil

import photographs
import pytest
from PIL import Image

from local.cli import UserError
from training.checks import check_folder, table
from training.data import from_folder, split


@pytest.fixture
def folder(tmp_path):
    return photographs.write(tmp_path / "photos", 10)


@pytest.fixture
def parted(tmp_path):
    for seed, part in enumerate(("train", "val", "test")):
        photographs.write(tmp_path / "parted" / part, 6, seed)
    return tmp_path / "parted"


def numbers(checked) -> dict:
    return {p: {n: len(x) for n, x in c.items()} for p, c in checked.parts.items()}


def refused(folder, **options) -> str:
    with pytest.raises(UserError) as error:
        check_folder(folder, **options)
    return str(error.value)


def test_a_good_folder_passes_and_is_counted(folder, parted):
    checked = check_folder(folder)
    assert numbers(checked) == {"all": {"china": 10, "flower": 10}}
    assert "china         10" in table(checked)
    assert numbers(check_folder(parted)) == {
        part: {"china": 6, "flower": 6} for part in ("train", "val", "test")
    }


def test_clutter_is_ignored_and_other_files_are_named(folder):
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "china" / ".DS_Store").write_bytes(b"\0")
    (folder / "china" / "._000.jpg").write_bytes(b"\0")
    (folder / "china" / "Thumbs.db").write_bytes(b"\0")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "__MACOSX").mkdir()
    assert check_folder(folder).notes == ["fewer than 20 images to learn from: china, flower"]
    (folder / "flower" / "notes.txt").write_text("mine")
    shutil.copy(folder / "china" / "001.jpg", folder / "loose.jpg")
    notes = " ".join(check_folder(folder).notes)
    assert "notes.txt" in notes and "loose.jpg" in notes


@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "text", "truncated"])
def test_unreadable_images_are_named_before_training(folder, content):
    broken = folder / "china" / "003.jpg"
    broken.write_bytes(broken.read_bytes()[:300] if content is None else content)
    assert "china/003.jpg" in refused(folder)
    checked = check_folder(folder, skip_bad=True)
    assert len(checked.parts["all"]["china"]) == 9
    assert any("003.jpg" in note for note in checked.notes)


def test_links_are_followed_and_broken_or_endless_ones_are_noticed(folder, tmp_path):
    elsewhere = photographs.write(tmp_path / "elsewhere", 3, seed=5)
    (folder / "china" / "more").symlink_to(elsewhere / "china")
    (folder / "china" / "again").symlink_to(folder)
    (folder / "china" / "one.jpg").symlink_to(elsewhere / "china" / "000.jpg")
    with pytest.raises(UserError, match="different classes"):  # `again` has the flowers too
        check_folder(folder)
    (folder / "china" / "again").unlink()
    (folder / "china" / "loop").symlink_to(folder / "china")
    checked = check_folder(folder)
    assert len(checked.parts["all"]["china"]) == 13
    (folder / "china" / "lost.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert "lost.jpg (a link to nothing)" in refused(folder)


def test_folders_that_cannot_be_learned_from(folder, tmp_path):
    assert "no folder" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no sub-folders" in refused(tmp_path / "empty")
    (folder / "birds").mkdir()
    assert "class 'birds' has no images" in refused(folder)
    (folder / "birds").rmdir()
    shutil.rmtree(folder / "flower")
    assert "only one class, 'china'" in refused(folder)


def test_a_tiny_class_is_refused_with_its_number(folder):
    for path in sorted((folder / "china").iterdir())[4:]:
        path.unlink()
    assert "'china' has 4 usable images; 5 are the least" in refused(folder)


def test_unbalanced_classes_are_noted(folder):
    for seed in range(1, 10):
        for i, picture in enumerate(photographs.cuts(12, seed)["flower"]):
            picture.save(folder / "flower" / f"{seed}-{i}.jpg")
    assert any(note.startswith("unbalanced: flower") for note in check_folder(folder).notes)


@pytest.mark.parametrize("name", ["two\nlines", " spaced", "\udcff", "tab\t"])
def test_names_that_cannot_be_in_classes_txt(folder, name):
    try:
        (folder / "china").rename(folder / name)
    except UnicodeEncodeError:
        os.rename(os.fsencode(folder / "china"), os.fsencode(folder / name))
    message = refused(folder)
    assert "cannot be a class" in message and message.encode()


def test_odd_but_good_names_are_kept(folder):
    (folder / "china").rename(folder / "Café & Temple, 中国")
    assert "Café & Temple, 中国" in check_folder(folder).parts["all"]


def test_two_spellings_of_one_class(folder):
    (folder / "Flower").mkdir()
    assert "two folders for one class" in refused(folder)


def test_a_class_called_train_is_a_class(folder):
    (folder / "china").rename(folder / "train")
    assert numbers(check_folder(folder)) == {"all": {"flower": 10, "train": 10}}


def test_duplicates_within_a_class_count_once(folder):
    picture = Image.open(folder / "china" / "000.jpg")
    picture.save(folder / "china" / "copy.png")  # another file, the same pixels
    checked = check_folder(folder)
    assert len(checked.parts["all"]["china"]) == 10
    assert any("again in its class" in note and "copy.png" in note for note in checked.notes)


def test_one_picture_in_two_classes_is_refused(folder):
    shutil.copy(folder / "china" / "000.jpg", folder / "flower" / "temple.jpg")
    message = refused(folder)
    assert "china/000.jpg" in message and "flower/temple.jpg" in message
    assert numbers(check_folder(folder, skip_bad=True)) == {"all": {"china": 9, "flower": 10}}


def test_one_picture_on_both_sides_of_the_split_is_refused(parted):
    shutil.copy(parted / "test/china/000.jpg", parted / "train/china/seen.jpg")
    message = refused(parted)
    assert "test/china/000.jpg" in message and "train/china/seen.jpg" in message
    checked = check_folder(parted, skip_bad=True)
    assert numbers(checked)["train"]["china"] == numbers(checked)["test"]["china"] == 6


def test_parts_must_have_the_same_classes(parted):
    photographs.write(parted / "train" / "birds", 1)
    assert "class 'birds' is not in both" in refused(parted)


def test_a_changed_file_is_looked_at_again(folder):
    check_folder(folder)
    (folder / "china" / "003.jpg").write_bytes(b"damaged since")
    assert "003.jpg" in refused(folder)


def test_the_split_is_stratified_disjoint_and_always_the_same(folder):
    first, second = (split(check_folder(folder).parts) for _ in "12")
    assert first == second
    sizes = {part: [len(paths) for paths in classes.values()] for part, classes in first.items()}
    assert sizes == {"train": [6, 6], "val": [2, 2], "test": [2, 2]}
    everything = [path for c in first.values() for paths in c.values() for path in paths]
    assert len(everything) == len(set(everything)) == 20


def test_what_is_missing_of_a_split_is_cut_from_train(parted):
    shutil.rmtree(parted / "val")
    (parted / "test").rename(parted / "Test")
    parts = split(check_folder(parted).parts)
    assert {part: len(classes["china"]) for part, classes in parts.items()} == {
        "train": 5,
        "val": 1,
        "test": 6,
    }


def test_the_layout_is_links_named_after_its_content(folder):
    layout = from_folder(folder)
    links = [path for path in layout.rglob("*") if path.is_symlink()]
    assert len(links) == 20
    assert {link.resolve() for link in links} == set(folder.rglob("*.jpg"))
    assert from_folder(folder) == layout
    (folder / "china" / "000.jpg").unlink()
    assert from_folder(folder) != layout
