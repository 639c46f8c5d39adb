"""Creates code buckets, one a region: `python -m layer.buckets` (create_code_buckets.sh)."""

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError

from local.cli import UserError, run

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def regions_of(text: str | None) -> list[str]:
    """The regions of a comma-separated list; without one, the configured region."""
    if text is None:
        configured = boto3.Session().region_name
        if not configured:
            raise UserError("No region: give --regions, or set AWS_REGION or a default region.")
        return [configured]
    regions = [region.strip() for region in text.split(",") if region.strip()]
    for region in regions:
        if not re.fullmatch(r"[a-z]{2}(-[a-z]+)+-\d", region):
            raise UserError(f"{region!r} is not the name of a region, such as eu-west-1.")
    if not regions:
        raise UserError("--regions names no region.")
    return list(dict.fromkeys(regions))


def bucket_name(prefix: str, region: str) -> str:
    name = f"{prefix}-{region}"
    if not BUCKET_NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no valid bucket name: 3 to 63 lower-case letters, digits, dots, hyphens."
        )
    return name


def create_bucket(name: str, region: str) -> bool:
    """Creates a private bucket; False if it was there and is ours. Raises UserError."""
    s3 = boto3.client("s3", region_name=region)
    try:
        s3.head_bucket(Bucket=name)
        return False
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code in ("403", "AccessDenied", "301"):
            raise UserError(
                f"The bucket {name} exists and is not yours (or not in {region}): choose another "
                "--bucket-prefix."
            ) from None
        if code not in ("404", "NoSuchBucket"):
            raise
    # us-east-1 is the one region that may not be named.
    where = {} if region == "us-east-1" else {"LocationConstraint": region}
    try:
        s3.create_bucket(Bucket=name, **({"CreateBucketConfiguration": where} if where else {}))
    except s3.exceptions.BucketAlreadyOwnedByYou:
        return False
    except s3.exceptions.BucketAlreadyExists:
        raise UserError(
            f"The bucket {name} belongs to somebody else: choose another --bucket-prefix."
        ) from None
    s3.put_public_access_block(
        Bucket=name,
        PublicAccessBlockConfiguration={
            "BlockPublicAcls": True,
            "IgnorePublicAcls": True,
            "BlockPublicPolicy": True,
            "RestrictPublicBuckets": True,
        },
    )
    return True


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """What boto3 raises, as a UserError."""
    try:
        yield
    except ClientError as error:
        message = error.response["Error"].get("Message") or error.response["Error"].get("Code")
        raise UserError(f"{error.operation_name} was refused: {message}") from error
    except (BotoCoreError, Boto3Error) as error:
        raise UserError(" ".join(str(error).split())) from error


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="create_code_buckets.sh",
        description="Create the S3 buckets PREFIX-REGION for code; your own are kept.",
    )
    parser.add_argument("--bucket-prefix", required=True, metavar="PREFIX")
    parser.add_argument("--regions", metavar="R1,R2", help="default: the configured region")
    options = parser.parse_args()
    with in_a_sentence():
        for region in regions_of(options.regions):
            name = bucket_name(options.bucket_prefix, region)
            created = create_bucket(name, region)
            print(f"{region}: {'created' if created else 'is there already'}", file=sys.stderr)
            print(name)


if __name__ == "__main__":
    run(main)
