"""A real S3 server on this machine (moto's), started once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest

BUCKET = "s3://clips"
KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDEN",
}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a server with the bucket ``BUCKET``."""
    server = pytest.importorskip("moto.server", reason="needs moto[server]")
    pytest.importorskip("s3fs", reason="needs s3fs")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def s3(s3_server: str) -> Iterator[str]:
    """The address, with an empty bucket and credentials in the environment."""
    import boto3

    own = {**KEYS, "AWS_ENDPOINT_URL": s3_server, "AWS_DEFAULT_REGION": "us-east-1"}
    with mock.patch.dict(os.environ, own):
        from bat.data import remote

        remote._systems.clear()
        client = boto3.client("s3")
        client.create_bucket(Bucket="clips")
        yield s3_server
        for entry in client.list_objects_v2(Bucket="clips").get("Contents", []):
            client.delete_object(Bucket="clips", Key=entry["Key"])
        remote._systems.clear()
