"""A small S3: as much of its protocol as Arrow speaks to keep, list and delete whole files."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from io import BytesIO
from typing import BinaryIO
from xml.sax.saxutils import escape

import pytest
from werkzeug import Request, Response
from werkzeug.serving import make_server

BUCKET = "bucket"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class S3:
    """One bucket, in memory."""

    def __init__(self) -> None:
        self.server = make_server("127.0.0.1", 0, Request.application(self._answer), threaded=True)
        self.objects: dict[str, tuple[bytes, float]] = {}  # content, when it was put
        self.puts: list[str] = []
        self.refuses = False  # to take anything
        self.answers = threading.Event()
        self.answers.set()

    def uri(self, path: str) -> str:
        address = f"127.0.0.1:{self.server.server_port}"
        return f"s3://{BUCKET}/{path}?endpoint_override={address}&scheme=http"

    def contents(self, folder: str) -> dict[str, bytes]:
        """Return the files in a folder, but for those that begin with a dot."""
        start = f"{folder}/"
        return {
            key.removeprefix(start): content
            for key, (content, _) in [*self.objects.items()]
            if key.startswith(start) and not key.startswith(f"{start}.") and key[-1] != "/"
        }

    def _answer(self, request: Request) -> Response:
        content = request.get_data()
        self.answers.wait()
        bucket, _, key = request.path.lstrip("/").partition("/")
        if request.method == "PUT" and self.refuses:
            return _failure(403, "AccessDenied")
        if bucket != BUCKET:
            return _failure(404, "NoSuchBucket")
        if request.method == "PUT":
            if "aws-chunked" in request.headers.get("Content-Encoding", ""):
                content = b"".join(_chunks(BytesIO(content)))
            self.objects[key] = content, datetime.now(UTC).timestamp()
            self.puts.append(key)
            return Response(headers={"ETag": '"0"'})
        if request.method == "DELETE":
            self.objects.pop(key, None)
            return Response(status=204)
        if "list-type" in request.args:
            return self._list(request.args.get("prefix", ""))
        if key and key not in self.objects:
            return _failure(404, "NoSuchKey")
        content, when = self.objects.get(key, (b"", 0.0))
        response = Response(content, headers={"ETag": '"0"'})
        response.last_modified = datetime.fromtimestamp(when, UTC)
        return response.make_conditional(request, accept_ranges=True, complete_length=len(content))

    def _list(self, prefix: str) -> Response:
        found = [
            f"<Contents><Key>{escape(key)}</Key><Size>{len(content)}</Size><LastModified>"
            f"{datetime.fromtimestamp(when, UTC):%Y-%m-%dT%H:%M:%S.000Z}</LastModified></Contents>"
            for key, (content, when) in sorted(self.objects.items())
            if key.startswith(prefix)
        ]
        return Response(
            f"<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>{len(found)}</KeyCount>"
            f"{''.join(found)}</ListBucketResult>"
        )


def _failure(status: int, code: str) -> Response:
    return Response(f"<Error><Code>{code}</Code><Message>no</Message></Error>", status)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    """Read what was sent in pieces, each with its size before it; a checksum follows them."""
    while size := int(file.readline().partition(b";")[0], 16):
        yield file.read(size)
        file.readline()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """An empty bucket and the credentials for it."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    bucket = S3()
    threading.Thread(target=bucket.server.serve_forever, args=(0.02,), daemon=True).start()
    yield bucket
    bucket.answers.set()
    bucket.server.shutdown()
