"""The bundle's way from S3, from a stand-in for S3 that speaks TLS."""

import hashlib
import time

import pytest
from conftest import archive

import download
from benchmarks import s3
from errors import ModelError


@pytest.fixture(scope="module")
def bundle(members, tmp_path_factory):
    """A bundle's bytes, and the variables that point boto3 at a server that has it."""
    folder = tmp_path_factory.mktemp("s3")
    data = archive(members | {"brightest.pt": bytes(3_000_000)})
    (folder / "model.tar.gz").write_bytes(data)
    with s3.running(folder, latency=0.001, rate=0) as variables:
        yield data, variables


@pytest.fixture(autouse=True)
def here(bundle, monkeypatch):
    monkeypatch.setattr(download, "begun", {})
    for name, value in (bundle[1] | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(name, value)


def test_what_has_begun_is_taken_over_once(bundle):
    download.begin(s3.BUCKET, "model.tar.gz")
    (running,) = download.begun.values()
    first = download.fetch(s3.BUCKET, "model.tar.gz")
    assert first is running.result()
    second = download.fetch(s3.BUCKET, "model.tar.gz")
    assert second is not first
    assert first.sha256 == second.sha256 == hashlib.sha256(bundle[0]).hexdigest()
    assert first.source == f"s3://{s3.BUCKET}/model.tar.gz"


def test_another_bundle_is_not_taken_for_the_one_that_has_begun():
    download.begin(s3.BUCKET, "model.tar.gz")
    with pytest.raises(ModelError, match="missing"):
        download.fetch(s3.BUCKET, "missing")


@pytest.mark.parametrize(
    ("change", "key", "code"),
    [
        ({}, "missing", "model_not_found"),
        ({}, None, "model_not_configured"),
        ({"MODEL_SHA256": "0" * 64}, "model.tar.gz", "model_archive_invalid"),
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1"}, "model.tar.gz", "model_unavailable"),
    ],
)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_failure_has_its_code_when_it_is_asked_for(monkeypatch, change, key, code, ahead):
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    if ahead:
        download.begin(s3.BUCKET, key)
    with pytest.raises(ModelError) as refused:
        download.fetch(s3.BUCKET, key)
    assert refused.value.code == code


def test_the_stand_in_is_as_slow_as_it_should_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(2_000_000))
    with s3.running(tmp_path, latency=0.05, rate=10e6) as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        client = download.boto3.client("s3")
        started = time.perf_counter()
        client.head_object(Bucket=s3.BUCKET, Key="file")
        connected = time.perf_counter()
        client.get_object(Bucket=s3.BUCKET, Key="file")["Body"].read()
        assert connected - started >= 0.15
        assert time.perf_counter() - connected >= 0.05 + 0.19 - s3.BUFFERED
