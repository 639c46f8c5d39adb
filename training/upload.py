"""Put a bundle on S3 and verify it: `python -m training.upload FILE s3://BUCKET/KEY`.

Which S3 is decided by the standard environment: credentials, profile, region, AWS_ENDPOINT_URL.
"""

import argparse
import base64
import hashlib
import json
from pathlib import Path
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import BotoCoreError, ClientError
from tqdm import tqdm

from layer.buckets import create_bucket
from local.cli import UserError, run
from local.paths import BUILD

# S3's limit for one PUT (https://docs.aws.amazon.com/AmazonS3/latest/userguide/upload-objects.html).
# Unlike a multipart upload, one PUT has the checksum of the whole object.
LARGEST_PUT = 5 * 1024**3
BUNDLE = BUILD / "model" / "model.tar.gz"


def upload(path: Path, bucket: str, key: str) -> dict:
    """Upload a file unless S3 has the same bytes there already; create the bucket if it is missing.

    The SHA-256 travels with the file: S3 computes it over what it received, refuses the upload if
    it differs, and stores it; afterwards it is read back and compared. Where no such checksum comes
    back, the object itself is read and hashed.

    Returns:
        `bucket`, `key`, `bytes`, `sha256` (hexadecimal), `uploaded` (False if it was there) and
        `created_bucket`.

    Raises:
        UserError: no credentials or region, a bucket of somebody else, or anything that S3 refuses.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path} to upload")
    size = path.stat().st_size
    if size > LARGEST_PUT:
        raise UserError(f"{path} has {size:,} bytes; S3 takes at most {LARGEST_PUT:,} in one piece")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    try:
        s3 = boto3.client("s3")
        created = create_bucket(bucket, s3.meta.region_name)
        uploaded = _stored_sha256(s3, bucket, key) != digest
        if uploaded:
            _put(s3, path, bucket, key, digest)
            if _stored_sha256(s3, bucket, key) != digest:
                raise UserError(f"s3://{bucket}/{key} is not the file that was uploaded")
    except (BotoCoreError, ClientError, S3UploadFailedError) as error:
        raise UserError(f"s3://{bucket}/{key}: {error}") from error
    return {
        "bucket": bucket,
        "key": key,
        "bytes": size,
        "sha256": digest.hex(),
        "uploaded": uploaded,
        "created_bucket": created,
    }


def _put(s3, path: Path, bucket: str, key: str, digest: bytes) -> None:
    with tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=f"s3://{bucket}") as bar:
        s3.upload_file(
            str(path),
            bucket,
            key,
            ExtraArgs={
                "ChecksumSHA256": base64.b64encode(digest).decode(),
                "ContentType": "application/gzip",
            },
            Callback=bar.update,
            Config=TransferConfig(multipart_threshold=LARGEST_PUT + 1),
        )


def _stored_sha256(s3, bucket: str, key: str) -> bytes | None:
    """SHA-256 of the object as S3 has it; None if there is no such object."""
    try:
        head = s3.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
            return None
        raise
    if "ChecksumSHA256" in head and head.get("ChecksumType") != "COMPOSITE":
        return base64.b64decode(head["ChecksumSHA256"])
    digest = hashlib.sha256()
    for chunk in s3.get_object(Bucket=bucket, Key=key)["Body"].iter_chunks(1024**2):
        digest.update(chunk)
    return digest.digest()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.upload", description=__doc__.split("\n")[0]
    )
    parser.add_argument("file", type=Path, nargs="?", default=BUNDLE)
    parser.add_argument("destination", metavar="s3://BUCKET/KEY")
    args = parser.parse_args()
    url = urlsplit(args.destination)
    if url.scheme != "s3" or not url.netloc or not url.path.strip("/"):
        raise UserError(f"the destination {args.destination!r} must look like s3://BUCKET/KEY")
    print(json.dumps(upload(args.file, url.netloc, url.path.lstrip("/"))))


if __name__ == "__main__":
    run(main)
