"""An embedded AWS for the tests, apart from anybody else's."""

import pytest

from local import aws


@pytest.fixture(scope="session")
def embedded(tmp_path_factory):
    """The environment variables of a running embedded AWS."""
    with aws.running(tmp_path_factory.mktemp("aws")) as variables:
        yield variables


@pytest.fixture(name="aws")
def aws_environment(embedded, monkeypatch):
    """Point boto3 and the command lines at the embedded AWS; gives its variables."""
    for name in aws.FOREIGN:
        monkeypatch.delenv(name, raising=False)
    for name, value in embedded.items():
        monkeypatch.setenv(name, value)
    return embedded
