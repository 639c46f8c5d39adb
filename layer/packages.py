"""Installs the packages that go into a layer, unpruned, for the Python that will run them.

`serving_packages` is also the serving environment in which a traced model is checked before it is
shipped: what it returns is exactly what the layer is made of.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from local.atomic import replacing
from local.cli import UserError
from local.install import TORCH_CPU_INDEX, torch_index
from local.paths import BUILD, ROOT
from local.processes import lock

REQUIREMENTS = ROOT / "pytorch" / "requirements.txt"
ARCHITECTURES = {"x86_64": "x86_64", "amd64": "x86_64", "arm64": "aarch64", "aarch64": "aarch64"}
# https://docs.aws.amazon.com/lambda/latest/dg/lambda-runtimes.html: python3.11 and older run on
# Amazon Linux 2, glibc 2.26; python3.12 and newer on Amazon Linux 2023, glibc 2.34.
GLIBC = {True: (2, 34), False: (2, 26)}
NEWEST_GLIBC = (2, 50)


@dataclass(frozen=True)
class Target:
    """The Python, processor and C library that the packages are for.

    `local` is the interpreter and platform that run this; otherwise AWS Lambda's.
    """

    local: bool
    python: str  # "3.13"
    architecture: str  # as Lambda calls it: "x86_64" or "arm64"
    emulator: tuple[str, ...] = ()  # command that runs the target's Python here

    @classmethod
    def create(
        cls,
        target: str | None = None,
        python: str | None = None,
        architecture: str | None = None,
        emulator: str = "",
    ) -> "Target":
        """`target` is "local" or "aws"; without one the environment's LAYER_TARGET, else local."""
        target = target or os.environ.get("LAYER_TARGET") or "local"
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        machine = ARCHITECTURES.get(platform.machine().lower(), platform.machine())
        machine = "arm64" if machine == "aarch64" else machine
        command = tuple(shlex.split(emulator))
        if command and shutil.which(command[0]) is None:
            raise UserError(f"The emulator {command[0]} is not installed.")
        if target == "local":
            if command:
                raise UserError("The local target runs here; an emulator is for --target aws.")
            if (python or here) != here or (architecture or machine) != machine:
                raise UserError(
                    f"The local target is Python {here} on {machine}, which is what runs here; "
                    "choose --target aws to build for another."
                )
            return cls(True, here, machine)
        if target != "aws":
            raise UserError(f"The target is local or aws, not {target!r}.")
        python = (python or "3.13").removeprefix("python")
        if not re.fullmatch(r"3\.\d{1,2}", python):
            raise UserError(f"A Python version looks like 3.13, not {python!r}.")
        architecture = architecture or "x86_64"
        if architecture not in ("x86_64", "arm64"):
            raise UserError(f"The architecture is x86_64 or arm64, not {architecture!r}.")
        return cls(False, python, architecture, command)

    @property
    def name(self) -> str:
        return f"{'local' if self.local else 'aws'}-python{self.python}-{self.architecture}"

    @property
    def runtime(self) -> str:
        return f"python{self.python}"

    @property
    def glibc(self) -> tuple[int, int]:
        return GLIBC[int(self.python.split(".")[1]) >= 12]

    def interpreter(self) -> str | None:
        """An interpreter that can run and compile for this target on this machine, if any.

        Bytecode is the same on every processor, so only the version of Python matters for it.
        """
        if self.python == f"{sys.version_info.major}.{sys.version_info.minor}":
            return sys._base_executable
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
        name = f"python{self.python}"
        found = [shutil.which(name), *sorted(pyenv.glob(f"{self.python}.*/bin/{name}"))]
        for candidate in filter(None, found):
            probe = "import sys; print('%d.%d' % sys.version_info[:2])"
            command = [str(candidate), "-I", "-S", "-c", probe]
            answer = subprocess.run(command, capture_output=True, text=True)
            if answer.returncode == 0 and answer.stdout.strip() == self.python:
                return str(candidate)
        return None

    def runner(self) -> list[str] | None:
        """The command that runs the target's Python on this machine, if any."""
        if self.emulator:
            return list(self.emulator)
        machine = ARCHITECTURES.get(platform.machine().lower())
        foreign = machine != ARCHITECTURES[self.architecture] or sys.platform != "linux"
        if not self.local and foreign:
            return None
        interpreter = self.interpreter()
        return [interpreter] if interpreter else None

    def pip_arguments(self, glibc: tuple[int, int] | None = None) -> list[str]:
        if self.local:
            return []
        machine = ARCHITECTURES[self.architecture]
        major, newest = glibc or self.glibc
        tags = [f"manylinux_{major}_{minor}_{machine}" for minor in range(newest, 4, -1)]
        tags += [f"manylinux2014_{machine}", f"manylinux2010_{machine}", f"linux_{machine}"]
        arguments = ["--python-version", self.python, "--implementation", "cp"]
        for tag in tags:
            arguments += ["--platform", tag]
        return arguments

    def markers(self) -> dict[str, str]:
        """What conditions such as `; platform_machine == "x86_64"` mean for the target."""
        if self.local:
            return {}
        return {
            "implementation_name": "cpython",
            "os_name": "posix",
            "platform_machine": ARCHITECTURES[self.architecture],
            "platform_python_implementation": "CPython",
            "platform_system": "Linux",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
        }


# pip applies --platform and --python-version to wheels' names only and asks the interpreter that
# runs it for the rest, which would bring CUDA's libraries for x86_64 into a layer for arm64.
PIP = """
import json, runpy, sys
from pip._vendor.packaging import markers
here, target = markers.default_environment, json.loads(sys.argv.pop(1))
markers.default_environment = lambda: {**here(), **target}
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """One build at a time in this repository, whatever folder it builds in."""
    path = ROOT / "build" / "layer.lock"
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(lock(path, patience=0))
        except TimeoutError:
            say("Waiting for another layer build to finish …")
            held = stack.enter_context(lock(path))
        os.set_inheritable(held, True)  # pip holds it too, should this process be killed alone
        yield


def serving_packages(target: Target | None = None, requirements: Path = REQUIREMENTS) -> Path:
    """The folder with the packages of `requirements` installed for the target, unpruned.

    Installed once (about half a minute for torch, plus the download) and reused while the
    requirements, the target and the index stay the same. Raises UserError.
    """
    with only_one():
        return install_packages(target or Target.create(), requirements)


def install_packages(target: Target, requirements: Path) -> Path:
    try:
        text = requirements.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The requirements file {requirements} cannot be read: {error}.") from None
    key = digest(text, target.name, os.environ.get("TORCH_INDEX_URL", ""))
    folder = BUILD / "layer" / f"packages-{target.name}-{key}"
    if folder.is_dir():
        return folder
    say(f"Installing the packages of {requirements.name} for {target.name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(f"packages-{target.name}-*"):
        shutil.rmtree(stale)
    index = torch_index() if re.search(r"^torch\b", text, re.MULTILINE) else []
    pins = resolve(target, requirements, index)
    say(f"  {len(pins)} packages: " + ", ".join(pins))
    with replacing(folder) as partial:
        arguments = ["--no-deps", "--target", str(partial), *target.pip_arguments(), *index, *pins]
        failure = f"The packages for {target.name} cannot be installed"
        pip(["install", *arguments], failure, target)
    return folder


def resolve(target: Target, requirements: Path, index: list[str]) -> list[str]:
    """The packages, with versions, that pip would install; nothing large is downloaded.

    Raises UserError for a CUDA build and for a wheel that needs a newer C library than AWS has.
    """
    question = ["install", "--dry-run", "--ignore-installed", "--requirement", str(requirements)]
    answer = BUILD / "layer" / "resolved.json"  # not stdout: pip would colour it in a notebook
    question += ["--report", str(answer), "--target", str(BUILD / "layer" / "none"), *index]
    failure = f"No set of wheels for {target.name} satisfies {requirements.name}"
    try:
        pip([*question, *target.pip_arguments()], failure, target)
    except UserError:
        if target.local:
            raise
        # Is it the C library? Ask again as if there were a newer one.
        pip([*question, *target.pip_arguments(NEWEST_GLIBC)], failure, target)
        report = answer.read_text()
        too_new = [f"{name} needs glibc {n}" for name, n in newer_glibc(report, target.glibc)]
        wanted = "{}.{}".format(*target.glibc)
        raise UserError(
            f"{target.runtime} on AWS Lambda has glibc {wanted}, but " + ", ".join(too_new) + "."
        ) from None
    found = {
        item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"]
        for item in json.loads(answer.read_text())["install"]
    }
    refuse_gpu(found)
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def refuse_gpu(found: dict[str, str]) -> None:
    """Raises UserError if these packages, name to version, are those of a GPU build of torch."""
    gpu = sorted(name for name in found if re.match(r"nvidia-|cuda-|triton$|pytorch-triton", name))
    version = found.get("torch", "")
    if gpu or "+cu" in version or "+rocm" in version:
        raise UserError(
            f"torch {version} is a GPU build ({', '.join(gpu[:3]) or version} …) of several GB, "
            f"and Lambda has no GPU. Set TORCH_INDEX_URL to an index with the CPU build, such "
            f"as {TORCH_CPU_INDEX}, or choose a version whose wheel is a CPU build."
        )


def newer_glibc(report: str, limit: tuple[int, int]) -> Iterator[tuple[str, str]]:
    for item in json.loads(report)["install"]:
        wheel = item["download_info"]["url"].rsplit("/", 1)[-1]
        tags = [(int(a), int(b)) for a, b in re.findall(r"manylinux_(\d+)_(\d+)_", wheel)]
        if tags and "manylinux1" not in wheel and "manylinux20" not in wheel and min(tags) > limit:
            yield item["metadata"]["name"], "{}.{}".format(*min(tags))


def pip(arguments: list[str], failure: str, target: Target) -> None:
    """Runs pip quietly for a target; UserError with its last error."""
    command = [sys.executable, "-c", PIP, json.dumps(target.markers())]
    command += ["--disable-pip-version-check", "--quiet"]
    fixed = ["--only-binary=:all:", "--no-compile", "--no-warn-conflicts"]
    command += [arguments[0], *fixed, *arguments[1:]]
    result = subprocess.run(command, capture_output=True, text=True, close_fds=False)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")]
        reason = (errors or result.stderr.splitlines() or ["pip said nothing"])[-1]
        raise UserError(f"{failure}: {reason.removeprefix('ERROR:').strip()}")


def container_packages(target: Target, requirements: Path) -> Path:
    """The same packages, installed by `sam build --use-container` in AWS's own build image.

    For packages that have no wheel: it needs Docker, and downloads the image. Raises UserError.
    """
    if target.local:
        raise UserError("--use-container installs for AWS Lambda: add --target aws.")
    sam = Path(sys.executable).parent / "sam"
    command = str(sam) if sam.exists() else shutil.which("sam")
    if command is None or shutil.which("docker") is None:
        raise UserError("--use-container needs the SAM CLI and Docker; one of them is missing.")
    folder = BUILD / "layer" / "container"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "code").mkdir(parents=True)
    shutil.copy(requirements, folder / "code" / "requirements.txt")
    properties = {"CodeUri": "code", "Handler": "app.handler", "Runtime": target.runtime}
    properties |= {"Architectures": [target.architecture], "Timeout": 60}
    function = {"Type": "AWS::Serverless::Function", "Properties": properties}
    template = {"Transform": "AWS::Serverless-2016-10-31", "Resources": {"Packages": function}}
    (folder / "template.json").write_text(json.dumps(template))
    say(f"Installing the packages of {requirements.name} in the container for {target.name}")
    environment = {**os.environ, "SAM_CLI_TELEMETRY": "0"}
    arguments = ["build", "--use-container", "--template", "template.json", "--build-dir", "built"]
    index = torch_index()
    if index:
        arguments += ["--container-env-var", f"PIP_EXTRA_INDEX_URL={index[1]}"]
    result = subprocess.run(
        [command, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise UserError(f"sam build --use-container failed: {(lines or ['no reason given'])[-1]}")
    packages = folder / "built" / "Packages"
    (packages / "requirements.txt").unlink(missing_ok=True)
    refuse_gpu(versions(packages))
    return packages


def versions(packages: Path) -> dict[str, str]:
    """Name to version of what is installed in a folder."""
    found = {}
    for path in sorted(packages.glob("*.dist-info")):
        name, version = path.name.removesuffix(".dist-info").split("-", 1)
        found[name.lower().replace("_", "-")] = version
    return found


def digest(*parts: str | bytes) -> str:
    """A short name for everything that these parts say."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "big") + data)
    return sha.hexdigest()[:16]
