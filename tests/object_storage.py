"""Object storage on loopback: moto's S3 server, from the environment that has DuckDB's extensions for a lake."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

from servers import free_port, stop

SECRET = "sesame-open-for-tests"
_START_S = 60.0


@contextmanager
def object_storage(python: Path) -> Iterator[dict[str, str]]:
    """Start a server, yield the environment variables that lead to it, stop it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [str(python), "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + _START_S
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{url}/moto-api/"):
                break
            assert server.poll() is None, "moto's server ended"
            assert time.monotonic() < end, "moto's server does not answer"
            time.sleep(0.1)
        yield {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": url,
        }
    finally:
        stop(server)  # type: ignore[arg-type]


def make_bucket(url: str, bucket: str) -> None:
    """Make an empty bucket."""
    _ask(f"{url}/{bucket}", "PUT")


def objects(url: str, bucket: str) -> dict[str, bytes]:
    """What is in the bucket: contents by key."""
    listed = ElementTree.fromstring(_ask(f"{url}/{bucket}?list-type=2"))
    keys = [e.text or "" for e in listed.iter() if e.tag.rpartition("}")[2] == "Key"]
    return {key: _ask(f"{url}/{bucket}/{quote(key)}") for key in keys}


def _ask(url: str, method: str = "GET") -> bytes:
    signed = "AWS4-HMAC-SHA256 Credential=testing/20261121/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    asked = urllib.request.Request(url, method=method, headers={"Authorization": signed})
    with urllib.request.urlopen(asked) as answer:
        content: bytes = answer.read()
        return content
