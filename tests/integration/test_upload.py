"""Upload to the S3 of the embedded AWS."""

import hashlib
import uuid

import boto3
import pytest

from local.cli import UserError
from training.upload import upload

pytestmark = pytest.mark.usefixtures("aws")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.tar.gz"
    path.write_bytes(b"weights" * 3_000_000)  # 21 MB: boto3 would upload it in parts by default
    return path


@pytest.fixture
def bucket():
    return f"upload-{uuid.uuid4()}"


def test_upload_creates_the_bucket_and_verifies(file, bucket):
    answer = upload(file, bucket, "models/model.tar.gz")
    assert answer["created_bucket"] and answer["uploaded"]
    assert answer["bytes"] == file.stat().st_size
    assert answer["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    s3 = boto3.client("s3")
    stored = s3.get_object(Bucket=bucket, Key="models/model.tar.gz")
    assert stored["Body"].read() == file.read_bytes()
    closed = s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"]
    assert len(closed) == 4 and all(closed.values())


def test_the_same_bytes_are_not_sent_twice_and_others_replace_them(file, bucket):
    upload(file, bucket, "key")
    modified = boto3.client("s3").head_object(Bucket=bucket, Key="key")["LastModified"]
    assert not upload(file, bucket, "key")["uploaded"]
    assert boto3.client("s3").head_object(Bucket=bucket, Key="key")["LastModified"] == modified
    file.write_bytes(b"other weights")
    answer = upload(file, bucket, "key")
    assert answer["uploaded"] and not answer["created_bucket"]


def test_an_object_without_a_checksum_of_the_whole_is_read_and_hashed(file, bucket):
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket=bucket)
    s3.upload_file(str(file), bucket, "key")  # in parts, with checksums of the parts
    assert not upload(file, bucket, "key")["uploaded"]


def test_another_region(file, bucket, monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.delenv("AWS_REGION", raising=False)
    assert upload(file, bucket, "key")["created_bucket"]
    place = boto3.client("s3").get_bucket_location(Bucket=bucket)["LocationConstraint"]
    assert place == "eu-west-1"


def test_failures_are_sentences(file, bucket, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no file"):
        upload(tmp_path / "none", bucket, "key")
    with pytest.raises(UserError, match=r"Invalid bucket name|InvalidBucketName"):
        upload(file, "Not_A_Bucket!", "key")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match="Could not connect"):
        upload(file, bucket, "key")
