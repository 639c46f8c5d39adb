"""The one exception that a deployment is told of, and when there is none."""

import pytest

from local.notebook import private_hosts


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        (None, ""),
        ("", ""),
        ("https://s3.eu-west-1.amazonaws.com", ""),
        ("http://10.0.0.7:4566", ""),
        ("http://127.0.0.1.example.com:4566", ""),
        ("http://127.0.0.1:4566", "127.0.0.1:4566"),
        ("http://127.0.0.1:4566/", "127.0.0.1:4566"),
        ("http://localhost:4566", "localhost:4566"),
    ],
)
def test_only_an_aws_on_this_machine_is_an_exception(monkeypatch, endpoint, expected):
    if endpoint is None:
        monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert private_hosts() == expected
