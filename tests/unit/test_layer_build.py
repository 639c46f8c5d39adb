"""The builder's gates and steps, with the real pip on wheels that the test makes."""

import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from layer import build, packages
from layer.packages import Target
from local import install
from local.cli import UserError


def wheel(folder, name, version, requires=(), tag="py3-none-any", files=None):
    """Writes a minimal wheel, with the metadata that pip reads."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {r}\n" for r in requires)
    contents = {
        f"{name}/__init__.py": "",
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
        **(files or {}),
    }
    contents[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as file:
        for path, text in contents.items():
            file.writestr(path, text)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that is all that pip knows, and a build folder of the test's own."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("TORCH_INDEX_URL", "")
    monkeypatch.setattr(install, "TORCH_CPU_INDEX", "http://127.0.0.1:9")
    monkeypatch.setattr(packages, "BUILD", tmp_path / "build")
    monkeypatch.setattr(build, "BUILD", tmp_path / "build")
    return folder


def requirements(tmp_path, text):
    path = tmp_path / "requirements.txt"
    path.write_text(text)
    return path


def test_packages_are_installed_once(index, tmp_path):
    wheel(index, "torch", "2.13.0", ["helper"])
    wheel(index, "helper", "1.0")
    path = requirements(tmp_path, "torch==2.13.0\n")
    folder = packages.serving_packages(Target.create("local"), path)
    assert (folder / "torch" / "__init__.py").exists() and (folder / "helper").is_dir()
    marker = folder / "marker"
    marker.touch()
    assert packages.serving_packages(Target.create("local"), path) == folder and marker.exists()
    path.write_text("torch==2.13.0  # changed\n")
    assert packages.serving_packages(Target.create("local"), path) != folder


def test_a_cuda_build_is_refused_by_name(index, tmp_path):
    wheel(index, "torch", "2.13.0", ["nvidia-cublas"])
    wheel(index, "nvidia_cublas", "13.0")
    with pytest.raises(UserError, match=r"torch 2.13.0 is a GPU build .nvidia-cublas"):
        packages.serving_packages(Target.create("local"), requirements(tmp_path, "torch==2.13.0"))
    assert not list((tmp_path / "build").rglob("torch"))


def test_a_cuda_build_is_refused_by_its_version(index, tmp_path):
    wheel(index, "torch", "2.13.0+cu130")
    with pytest.raises(UserError, match=r"torch 2.13.0\+cu130 is a GPU build"):
        packages.serving_packages(Target.create("local"), requirements(tmp_path, "torch"))


def test_a_wheel_for_a_newer_glibc_is_refused_by_name(index, tmp_path):
    wheel(index, "torch", "2.13.0", tag="cp311-cp311-manylinux_2_28_x86_64")
    wheel(index, "torch", "2.13.0", tag="cp313-cp313-manylinux_2_39_x86_64")
    path = requirements(tmp_path, "torch==2.13.0")
    with pytest.raises(
        UserError, match=r"python3.11 .* has glibc 2.26, but torch needs glibc 2.28"
    ):
        packages.serving_packages(Target.create("aws", "3.11"), path)
    with pytest.raises(
        UserError, match=r"python3.13 .* has glibc 2.34, but torch needs glibc 2.39"
    ):
        packages.serving_packages(Target.create("aws", "3.13"), path)


def test_what_cannot_be_found_is_named(index, tmp_path):
    with pytest.raises(UserError, match=r"satisfies requirements.txt: .*nosuchthing"):
        packages.serving_packages(Target.create("local"), requirements(tmp_path, "nosuchthing==1"))
    with pytest.raises(UserError, match="cannot be read"):
        packages.serving_packages(Target.create("local"), tmp_path / "missing.txt")


def test_a_layer_that_does_not_work_is_not_written(index, tmp_path):
    wheel(index, "torch", "2.13.0")  # has no library and cannot predict
    wheel(index, "zstandard", "0.25.0", files={"zstandard/backend_c.test.so": "no library"})
    output = tmp_path / "layer.zip"
    output.write_bytes(b"the last good one")
    with pytest.raises(UserError, match="not written"):
        build.build(Target.create("local"), requirements(tmp_path, "torch==2.13.0"), output)
    assert output.read_bytes() == b"the last good one"
    assert not list((tmp_path / "build" / "layer").glob("stage-*"))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("moon",), "local or aws"),
        (("aws", "three"), "looks like 3.13"),
        (("aws", "3.13", "sparc"), "x86_64 or arm64"),
        (("local", "3.9"), "choose --target aws"),
    ],
)
def test_targets_that_do_not_exist(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        Target.create(*arguments)


def test_the_target_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("LAYER_TARGET", "aws")
    assert Target.create() == Target(False, "3.13", "x86_64")
    monkeypatch.delenv("LAYER_TARGET")
    assert Target.create().local
    assert Target.create().python == f"{sys.version_info.major}.{sys.version_info.minor}"


def test_a_container_is_for_aws_and_needs_docker(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="add --target aws"):
        packages.container_packages(Target.create("local"), packages.REQUIREMENTS)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs the SAM CLI and Docker"):
        packages.container_packages(Target.create("aws"), packages.REQUIREMENTS)


def test_limits():
    numbers = {"limit": 262_144_000, "packages": {"torch": {}, "scipy": {}}}
    build.check_limits(numbers | {"unzipped": 250_000_000, "extracted": 345_000_000}, 512)
    with pytest.raises(UserError, match=r"260,000,000 bytes unzipped.*torch, scipy"):
        build.check_limits(numbers | {"unzipped": 260_000_000, "extracted": 0}, 512)
    large = numbers | {"unzipped": 1, "extracted": 600_000_000}
    build.check_limits(large, 1024)
    with pytest.raises(UserError, match=r"600,000,000 bytes.*with SnapStart 512"):
        build.check_limits(large, 512)


def test_snapstart_allows_no_more_tmp(capsys, monkeypatch):
    arguments = ["layer.build", "--snapstart", "--ephemeral-storage", "1024"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as refused:
        build.main()
    assert refused.value.code == 2
    assert "with SnapStart, --ephemeral-storage is at most 512" in capsys.readouterr().err


@pytest.fixture
def numpy_stage(tmp_path) -> Path:
    """numpy's own shared libraries, which need each other, as in a layer."""
    source = Path(np.__file__).parent.with_name("numpy.libs")
    if not source.is_dir():
        pytest.skip("this numpy brings no libraries")
    shutil.copytree(source, tmp_path / "numpy.libs")
    return tmp_path


def test_the_neighbours_of_a_library_come_in_an_order_that_loads(numpy_stage):
    names = {path.name: name for name, path in build.files(numpy_stage)}
    (openblas,) = (name for base, name in names.items() if "openblas" in base)
    found = [
        Path(name).name.split("-")[0] for name in build.neighbours(numpy_stage, openblas, names)
    ]
    assert "libgfortran" in found and "libscipy_openblas64_" not in found
    if "libquadmath" in found:  # which libgfortran needs, where the processor has no such numbers
        assert found.index("libquadmath") < found.index("libgfortran")


def test_a_library_that_nobody_brings_is_refused_by_name(numpy_stage):
    build.check_libraries(numpy_stage)
    (gfortran,) = numpy_stage.glob("numpy.libs/libgfortran*")
    gfortran.unlink()
    with pytest.raises(UserError, match=r"openblas.* needs libgfortran.*neither in the layer"):
        build.check_libraries(numpy_stage)


def test_frames_come_back_as_they_were(tmp_path, monkeypatch):
    import zstandard

    monkeypatch.setattr(build, "BUILD", tmp_path)
    monkeypatch.setattr(build, "FRAME", 1000)
    (tmp_path / "layer").mkdir()
    data = bytes(range(256)) * 17
    for _ in range(2):  # the second time from what is kept
        frames = build.compressed(data, "library")
        assert b"".join(zstandard.decompress(frame) for frame in frames) == data
    assert len(frames) == 5 and len(list((tmp_path / "layer").iterdir())) == 1


def test_zip_is_reproducible_and_dated_like_no_machine(tmp_path):
    stage = tmp_path / "stage"
    (stage / ".requirements").mkdir(parents=True)
    (stage / "module.py").write_text("answer = 42\n")
    manifest = {"inputs": "x", "budget": {"unzipped": 1}}
    build.write_json(stage / ".requirements" / "manifest.json", manifest)
    for name in ("one.zip", "two.zip"):
        build.write_zip(stage, tmp_path / name)
        (stage / "module.py").touch()
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    size = (tmp_path / "one.zip").stat().st_size
    expected = manifest | {"budget": {"unzipped": 1, "zipped": size}}
    assert build.read_manifest(tmp_path / "one.zip") == expected
    (tmp_path / "one.zip").write_bytes(json.dumps(manifest).encode())
    assert build.read_manifest(tmp_path / "one.zip") is None
