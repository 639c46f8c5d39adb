"""Publishes a layer's zip: `python -m layer.publish`, called by publish_lambda_layers.sh.

Uploads to the bucket PREFIX-REGION (see buckets.py) and publishes a layer version whose compatible
runtime and architecture come from the zip itself, so that no layer is offered to a Python that it
was not built for. Speaks to whatever AWS the standard environment names.
"""

import argparse
import base64
import contextlib
import hashlib
import os
import re
import sys
from pathlib import Path

import boto3
from botocore.exceptions import ClientError

from layer.buckets import bucket_name, in_a_sentence, regions_of
from layer.build import default_name, read_manifest
from layer.packages import REQUIREMENTS
from local.cli import UserError, run
from local.paths import ROOT


def publish(
    zip_path: Path, region: str, bucket: str, layer_name: str, permission: dict | None = None
) -> str:
    """The ARN of the version of the layer with exactly this zip, published if there is none.

    The latest version is reused when its content and compatibility are the same. `permission`:
    arguments of add_layer_version_permission beyond names. Raises UserError, ClientError.
    """
    manifest = read_manifest(zip_path)
    if manifest is None:
        raise UserError(f"{zip_path} is no layer made by create_layer_zipfile.sh.")
    sha256 = base64.b64encode(hashlib.sha256(zip_path.read_bytes()).digest()).decode()
    client = boto3.client("lambda", region_name=region)
    version = latest_version(client, layer_name)
    if version and version["Content"]["CodeSha256"] == sha256:
        print(f"{region}: {layer_name} has this content already", file=sys.stderr)
    else:
        key = f"lambda-layers/{zip_path.name}"
        upload(zip_path, region, bucket, key)
        version = client.publish_layer_version(
            LayerName=layer_name,
            Description=f"PyTorch {manifest['packages'].get('torch', '')} for {manifest['target']}",
            Content={"S3Bucket": bucket, "S3Key": key},
            CompatibleRuntimes=[manifest["runtime"]],
            CompatibleArchitectures=[manifest["architecture"]],
        )
        stored = version["Content"]["CodeSha256"]
        if stored != sha256:
            raise UserError(f"Lambda stored another content ({stored}) than {zip_path} has.")
    if permission:
        permit(client, layer_name, version["Version"], permission)
    return version["LayerVersionArn"]


def latest_version(client, layer_name: str) -> dict | None:
    versions = client.list_layer_versions(LayerName=layer_name, MaxItems=1)["LayerVersions"]
    if not versions:
        return None
    return client.get_layer_version(LayerName=layer_name, VersionNumber=versions[0]["Version"])


def upload(zip_path: Path, region: str, bucket: str, key: str) -> None:
    size = zip_path.stat().st_size
    sent = 0

    def progress(count: int) -> None:
        nonlocal sent
        sent += count
        if sys.stderr.isatty():
            text = f"\r{region}: {sent / 1e6:.0f} of {size / 1e6:.0f} MB to s3://{bucket}/{key} "
            print(text, end="\n" if sent == size else "", file=sys.stderr, flush=True)

    print(f"{region}: uploading {size / 1e6:.0f} MB to s3://{bucket}/{key}", file=sys.stderr)
    s3 = boto3.client("s3", region_name=region)
    try:
        s3.head_bucket(Bucket=bucket)
    except ClientError:
        raise UserError(
            f"There is no bucket {bucket} that you may use; create it first: "
            f"layer/create_code_buckets.sh --bucket-prefix {bucket.removesuffix('-' + region)} "
            f"--regions {region}"
        ) from None
    s3.upload_file(str(zip_path), bucket, key, Callback=progress)


def permit(client, layer_name: str, version: int, permission: dict) -> None:
    statement = "use-" + re.sub(
        r"\W", "", permission.get("OrganizationId", permission["Principal"])
    )
    # A conflict says that this version has the permission already.
    with contextlib.suppress(client.exceptions.ResourceConflictException):
        client.add_layer_version_permission(
            LayerName=layer_name,
            VersionNumber=version,
            StatementId="use-everyone" if statement == "use-" else statement,
            Action="lambda:GetLayerVersion",
            **permission,
        )


def permission_of(options: argparse.Namespace) -> dict | None:
    if options.public:
        return {"Principal": "*"}
    if options.account:
        if not re.fullmatch(r"\d{12}", options.account):
            raise UserError(f"An account has 12 digits, not {options.account!r}.")
        return {"Principal": options.account}
    if options.organization:
        if not re.fullmatch(r"o-[a-z0-9]{10,32}", options.organization):
            raise UserError(
                f"An organisation looks like o-a1b2c3d4e5, not {options.organization!r}."
            )
        return {"Principal": "*", "OrganizationId": options.organization}
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="publish_lambda_layers.sh",
        description="Publish the layer's zip by way of the buckets PREFIX-REGION. Standard output: "
        "one LayerVersionArn a region. Only your own account may use it unless you say otherwise.",
    )
    parser.add_argument("--bucket-prefix", required=True, metavar="PREFIX")
    parser.add_argument("--regions", metavar="R1,R2", help="default: the configured region")
    parser.add_argument("--layer-name", metavar="NAME", default="pytorch", help="default: pytorch")
    parser.add_argument("--zip", type=Path, help="default: the one create_layer_zipfile.sh makes")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--public", action="store_true", help="let everyone use it")
    who.add_argument("--account", metavar="ID", help="let this account use it")
    who.add_argument("--organization", metavar="ID", help="let this organisation use it")
    options = parser.parse_args()
    if not re.fullmatch(r"[a-zA-Z0-9_-]{1,140}", options.layer_name):
        raise UserError(f"{options.layer_name!r} is no layer name: letters, digits, - and _.")
    zip_path = options.zip or ROOT / "layer" / default_name(REQUIREMENTS)
    if not zip_path.is_file():
        raise UserError(
            f"{os.path.relpath(zip_path)} does not exist; make it with create_layer_zipfile.sh."
        )
    permission = permission_of(options)
    with in_a_sentence():
        for region in regions_of(options.regions):
            bucket = bucket_name(options.bucket_prefix, region)
            print(publish(zip_path, region, bucket, options.layer_name, permission), flush=True)


if __name__ == "__main__":
    run(main)
