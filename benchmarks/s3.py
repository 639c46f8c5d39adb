"""A stand-in for S3 that is as far away and as fast as it should be: for the benchmarks.

It serves the files of a folder as s3://bucket/NAME over TLS, in a process of its own. `latency`
passes before each answer, and twice more for a connection; all connections together get at most
`rate` bytes a second.
"""

import argparse
import contextlib
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import trustme

from local.cli import UserError
from local.paths import ROOT

CHUNK = 1 << 16  # bytes
BUFFERED = 0.02  # seconds
BUCKET = "bucket"


class Link:
    """Bytes pass it at a rate (a second; 0 is unlimited), those of all threads together."""

    def __init__(self, rate: float):
        self.rate, self.lock, self.free_at = rate, threading.Lock(), 0.0

    def wait_for(self, size: int) -> None:
        if self.rate:
            with self.lock:
                # A network's buffers go on sending while the server's thread is late.
                self.free_at = max(self.free_at, time.monotonic() - BUFFERED) + size / self.rate
                until = self.free_at
            time.sleep(max(0.0, until - time.monotonic()))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        time.sleep(2 * self.server.latency)  # TCP's handshake and TLS's
        self.request.do_handshake()
        super().setup()

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def do_GET(self) -> None:
        self.answer(send=True)

    def answer(self, send: bool) -> None:
        time.sleep(self.server.latency)
        content = self.server.objects.get(self.path.split("?")[0])
        if content is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, end = 0, len(content) - 1
        if wanted := self.headers.get("Range"):  # bytes=first-last
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or end), end)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        self.send_header("Content-Length", str(end + 1 - start))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if send:
            for place in range(start, end + 1, CHUNK):
                chunk = content[place : min(place + CHUNK, end + 1)]
                self.server.link.wait_for(len(chunk))
                self.wfile.write(chunk)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True


def serve(folder: Path, certificate: Path, latency: float, rate: float) -> None:
    """Prints its port, then serves until the process is ended."""
    server = Server(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    server.latency, server.link = latency, Link(rate)
    server.objects = {
        f"/{BUCKET}/{path.name}": memoryview(path.read_bytes()) for path in folder.iterdir()
    }
    print(server.server_port, flush=True)
    server.serve_forever()


@contextlib.contextmanager
def running(folder: Path, latency: float, rate: float) -> Iterator[dict[str, str]]:
    """Such a server, until the block ends. Yields the variables that point a function's boto3 at
    it. `latency` in seconds, `rate` in bytes a second, 0 for as fast as it can."""
    authority = trustme.CA()
    with tempfile.TemporaryDirectory() as place:
        certificate, trusted = Path(place, "server.pem"), Path(place, "ca.pem")
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(certificate)
        authority.cert_pem.write_to_path(trusted)
        command = [sys.executable, "-m", "benchmarks.s3", folder, certificate, latency, rate]
        process = subprocess.Popen(
            [str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        try:
            port = process.stdout.readline().strip()
            if not port:
                raise UserError("The stand-in for S3 did not start.")
            yield {
                "AWS_ENDPOINT_URL_S3": f"https://127.0.0.1:{port}",
                "AWS_CA_BUNDLE": str(trusted),
                "AWS_ACCESS_KEY_ID": "none",
                "AWS_SECRET_ACCESS_KEY": "none",
            }
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.s3", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("certificate", type=Path, help="certificate and key, PEM")
    parser.add_argument("latency", type=float, help="seconds")
    parser.add_argument("rate", type=float, help="bytes a second; 0 for as fast as it can")
    options = parser.parse_args()
    serve(options.folder, options.certificate, options.latency, options.rate)
