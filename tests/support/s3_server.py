"""A small S3: as much of its protocol as Arrow speaks to keep, list and delete whole files."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase, BytesIO
from time import gmtime, strftime, time
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

Headers = dict[str, str]

BUCKET = "bucket"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class S3(ThreadingHTTPServer):
    """One bucket, in memory."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, tuple[bytes, float]] = {}  # content, when it was put
        self.puts: list[str] = []
        self.refuses = False  # to take anything
        self.answers = threading.Event()
        self.answers.set()

    def uri(self, path: str) -> str:
        return f"s3://{BUCKET}/{path}?endpoint_override=127.0.0.1:{self.server_port}&scheme=http"

    def contents(self, folder: str) -> dict[str, bytes]:
        """Return the files in a folder, but for those that begin with a dot."""
        start = f"{folder}/"
        return {
            key.removeprefix(start): content
            for key, (content, _) in [*self.objects.items()]
            if key.startswith(start) and not key.startswith(f"{start}.") and key[-1] != "/"
        }

    def lines(self, key: str) -> int:
        return self.objects[key][0].count(b"\n") if key in self.objects else 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3

    def do_PUT(self) -> None:
        content = self._body()
        if self.server.refuses:
            self._fail(403, "AccessDenied")
        elif self._key is None:
            self._fail(404, "NoSuchBucket")
        else:
            self.server.objects[self._key] = content, time()
            self.server.puts.append(self._key)
            self._answer(200)

    def do_DELETE(self) -> None:
        self.server.objects.pop(self._key or "", None)
        self._answer(204)

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if self._key is None:
            self._fail(404, "NoSuchBucket")
        elif "list-type" in query:
            self._list(query.get("prefix", [""])[0])
        elif self._key == "":
            self._answer(200)
        elif self._key not in self.server.objects:
            self._fail(404, "NoSuchKey")
        else:
            self._send(*self.server.objects[self._key])

    do_HEAD = do_GET  # noqa: N815

    def _send(self, content: bytes, when: float) -> None:
        headers = {"Last-Modified": formatdate(when, usegmt=True)}
        if not (asked := self.headers.get("Range")):
            self._answer(200, content, headers)
            return
        total = len(content)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        content = content[int(first) : int(last or total) + 1]
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(content) - 1}/{total}"
        self._answer(206, content, headers)

    def _list(self, prefix: str) -> None:
        found = [
            f"<Contents><Key>{escape(key)}</Key><Size>{len(content)}</Size><LastModified>"
            f"{strftime('%Y-%m-%dT%H:%M:%S.000Z', gmtime(when))}</LastModified></Contents>"
            for key, (content, when) in sorted(self.server.objects.items())
            if key.startswith(prefix)
        ]
        text = (
            f"<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>{len(found)}</KeyCount>"
            f"{''.join(found)}</ListBucketResult>"
        )
        self._answer(200, text.encode())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b"".join(_chunks(self.rfile))
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            return b"".join(_chunks(BytesIO(content)))
        return content

    @property
    def _key(self) -> str | None:
        bucket, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
        return key if bucket == BUCKET else None

    def _fail(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())

    def _answer(self, status: int, content: bytes = b"", headers: Headers | None = None) -> None:
        self.server.answers.wait()
        self.send_response(status)
        for name, value in {"ETag": '"0"', **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def _chunks(file: BufferedIOBase) -> Iterator[bytes]:
    """Read what was sent in pieces, each with its size before it, and a checksum at the end."""
    while size := int(file.readline().partition(b";")[0], 16):
        yield file.read(size)
        file.readline()
    while file.readline().strip():
        pass


@contextmanager
def s3_server() -> Iterator[S3]:
    """Serve an empty bucket, with the credentials for it in the environment."""
    with mock.patch.dict(os.environ, CREDENTIALS), S3() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.answers.set()
            server.shutdown()
