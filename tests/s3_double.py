"""An object store on this machine: moto's server, with the environment pointing to it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
from moto.server import ThreadedMotoServer

SECRET = "word-nobody-may-see"


@contextmanager
def s3_bucket(name: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """Yield the root of a bucket that holds these files."""
    import boto3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in settings.items():
                patch.setenv(variable, value)
            client = boto3.client("s3", region_name="us-east-1")
            client.create_bucket(Bucket=name)
            for key, content in files.items():
                client.put_object(Bucket=name, Key=key, Body=content)
            yield f"s3://{name}"
    finally:
        server.stop()
