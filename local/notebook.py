"""What the cells of the notebooks call, so that they hold no logic of their own.

The only module of the project that distinguishes the embedded AWS from a real account.
"""

import hashlib
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import botocore.config
import botocore.exceptions

from local import aws
from local.cli import UserError, shown
from local.paths import BUILD, ROOT

AWS_ERRORS = (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError)
SHARED_FOR = 3600  # seconds that the address of a shared image is valid


def check_versions() -> None:
    """Print the pinned packages and what is installed. UserError if they differ."""
    pins = re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    wrong = []
    for name, pinned in pins:
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = "missing"
        fits = installed.split("+")[0] == pinned  # torch's CPU builds are called 2.14.1+cpu
        wrong += [] if fits else [f"{name} {installed} instead of {pinned}"]
        print(f"{name:15} {pinned:10} {'ok' if fits else installed}")
    if wrong:
        raise UserError(
            f"This kernel, {sys.executable}, is not the tested one: {', '.join(wrong)}. "
            "Run `make install` and choose .venv/bin/python as the kernel."
        )


def embedded_packages() -> list[str]:
    """The names of the packages in the embedded AWS's environment, in lower case."""
    python = require(ROOT / ".venv-aws" / "bin" / "python", "`make install`")
    code = "from importlib.metadata import distributions as d; print(*[x.name for x in d()])"
    listed = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return listed.stdout.lower().split()


def connect() -> None:
    """Decide where this notebook's AWS calls go, and say so.

    - `AWS_ENDPOINT_URL` is set: there (`make lab`, `make run` and `make aws` set it).
    - `AWS_PROFILE` or `AWS_ACCESS_KEY_ID` is set: to that AWS account.
    - otherwise: to the embedded AWS, which is started if it does not run yet.

    Sets the process's environment, which `%%bash` cells inherit. UserError if nothing answers.
    """
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ.setdefault("AWS_PAGER", "")
    os.environ["BUILD_DIR"] = str(BUILD)
    chosen = "AWS_ENDPOINT_URL" in os.environ
    if not chosen and not {"AWS_PROFILE", "AWS_ACCESS_KEY_ID"} & set(os.environ):
        aws.adopt(aws.environment(aws.start(BUILD / "aws")))
    embedded = "AWS_ENDPOINT_URL" in os.environ
    os.environ.setdefault("LAYER_TARGET", "local" if embedded else "aws")
    try:
        session = boto3.Session()
        if not session.region_name:
            raise UserError("No AWS region is configured: set AWS_REGION or the profile's region.")
        account = session.client("sts").get_caller_identity()["Account"]
    except botocore.exceptions.EndpointConnectionError as error:
        raise UserError(
            f"{error} If it was the embedded AWS, start it again (`make lab`), "
            "or restart this kernel with AWS_ENDPOINT_URL unset."
        ) from None
    except AWS_ERRORS as error:
        raise UserError(f"AWS does not let you in: {error}") from None
    os.environ["AWS_REGION"] = os.environ["AWS_DEFAULT_REGION"] = session.region_name
    if embedded:
        print(f"Embedded AWS at {os.environ['AWS_ENDPOINT_URL']} in region {session.region_name}")
    else:
        print(f"AWS account {account} in region {session.region_name}: what is created is billed")


def bucket_name(purpose: str = "pytorch-sam") -> str:
    """A bucket name that is the same in every notebook and unique to account and region."""
    session = boto3.Session()
    account = session.client("sts").get_caller_identity()["Account"]
    return f"{purpose}-{account}-{session.region_name}"


def model_key(bundle: Path = BUILD / "model" / "model.tar.gz") -> str:
    """The key under which notebook 03 uploads a bundle: other content, other key.

    So a new model is a change of the stack, and Lambda starts new environments for it.
    """
    with open(require(bundle, "03_bundle_and_upload"), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"models/{digest[:16]}/{bundle.name}"


def require(path: Path, maker: str) -> Path:
    """`path`, if the earlier notebook `maker` has written it; else UserError, naming it."""
    if not path.exists():
        raise UserError(f"{shown(path)} is missing: run {maker} first.")
    return path


def require_layer(name: str) -> dict:
    """The newest version of a layer, as `list_layer_versions` describes it.

    UserError, naming notebook 05, if there is none.
    """
    versions = boto3.client("lambda").list_layer_versions(LayerName=name)["LayerVersions"]
    if not versions:
        raise UserError(f"There is no layer {name}: run notebook 05_layer first.")
    return versions[0]


def require_stack(name: str) -> dict[str, str]:
    """The outputs of the deployed stack `name`; UserError, naming notebook 06, if there is none."""
    try:
        (stack,) = boto3.client("cloudformation").describe_stacks(StackName=name)["Stacks"]
    except botocore.exceptions.ClientError as error:
        reason = error.response["Error"]["Message"]
        raise UserError(f"No stack {name} ({reason}): run notebook 06_deploy first.") from None
    status = stack["StackStatus"]
    if not status.endswith("_COMPLETE") or status.startswith(("DELETE", "ROLLBACK")):
        raise UserError(f"Stack {name} is in {status}: run notebook 06_deploy again.")
    return {output["OutputKey"]: output["OutputValue"] for output in stack.get("Outputs", [])}


def sample_images(folder: str | Path | None = None, limit: int = 10) -> list[Path]:
    """At most `limit` images of a folder and its sub-folders, spread evenly, always the same.

    A relative path is meant from the repository's root. `None` stands for the test images of the
    data that notebook 01's model was made of, which gives one of each of the digits; for a model
    without data, for two photographs out of scikit-learn.
    """
    # These import torch, which not every notebook needs.
    from training.data import write_photographs
    from training.model import TrainedModel
    from training.trace import find_images

    if folder:
        return find_images(ROOT / Path(folder).expanduser(), limit)
    checkpoint = require(BUILD / "model" / "checkpoint.pt", "01_train")
    data = TrainedModel.load(checkpoint).data_folder
    return find_images(data / "test" if data else write_photographs(), limit)


def share_image(path: Path, bucket: str) -> str:
    """Upload a file to `bucket` and return an address for it that is valid for an hour."""
    config = botocore.config.Config(signature_version="s3v4")
    s3 = boto3.client("s3", config=config)
    with path.open("rb") as file:  # by content: names may come twice
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    key = f"images/{digest[:16]}/{path.name}"
    try:
        s3.upload_file(str(path), bucket, key)
    except (*AWS_ERRORS, boto3.exceptions.S3UploadFailedError) as error:
        raise UserError(f"{error}: run notebook 03_bundle_and_upload first.") from None
    return s3.generate_presigned_url(
        "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=SHARED_FOR
    )


def reachable(url: str) -> str:
    """The address at which an API Gateway URL is answered from here.

    On AWS that is the URL itself. The embedded AWS answers
    `https://ID.execute-api.REGION.amazonaws.com/STAGE/PATH` under its own address.
    """
    embedded = os.environ.get("AWS_ENDPOINT_URL")
    parts = urlsplit(url)
    host = parts.hostname or ""
    if not embedded or ".execute-api." not in host:
        return url
    api = host.split(".")[0]
    return f"{embedded.rstrip('/')}/_aws/execute-api/{api}{parts.path}"


def private_hosts() -> str:
    """`host:port` of the AWS that is called, if it is on this machine; empty for a real one.

    The deployed function fetches images from public servers only. The embedded AWS, whose S3 has
    the sample images, is on 127.0.0.1: the one exception that the function has to be told.
    """
    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL", ""))
    return endpoint.netloc if endpoint.hostname in ("127.0.0.1", "localhost") else ""
