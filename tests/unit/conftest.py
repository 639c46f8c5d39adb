"""Small real things for the unit tests: a bundle with a tiny model, a web server on 127.0.0.1."""

import io
import tarfile
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

# The networks are tiny: more threads only wait for each other, for long on a busy machine.
torch.set_num_threads(1)

CLASSES = ["red", "green", "blue"]


@dataclass
class Context:
    """What the handler uses of Lambda's context object."""

    aws_request_id: str = "11111111-2222-3333-4444-555555555555"
    remaining: float = 60_000  # milliseconds

    def get_remaining_time_in_millis(self) -> float:
        return self.remaining


class Brightest(torch.nn.Module):
    """Classifies an image by its strongest colour channel: right answers are easy to know."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return 10 * batch.mean(dim=(2, 3))


def png(colour, size=(40, 30), mode="RGB", form="PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, form)
    return file.getvalue()


def script(module: torch.nn.Module) -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module.eval()), file)
    return file.getvalue()


def archive(members: dict[str, bytes]) -> bytes:
    """A tar.gz of the given files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture(scope="session")
def members() -> dict[str, bytes]:
    return {"brightest.pt": script(Brightest()), "classes.txt": "\n".join(CLASSES).encode()}


@pytest.fixture
def web(monkeypatch):
    """A web server; `web.serve(path, …)` says what it answers and returns the address.

    It is on 127.0.0.1, which the handler may reach only because it is excepted here.
    """

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        answers: dict

        def serve(self, path, content=b"", status=200, headers=None, chunks=None):
            self.answers[path] = (status, headers or {}, chunks or [content])
            return f"http://127.0.0.1:{self.server_port}{path}"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, chunks = self.server.answers.get(self.path, (404, {}, [b""]))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                for chunk in chunks:
                    self.wfile.write(chunk)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client has had enough

        def log_message(self, *arguments):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    server.answers = {}
    monkeypatch.setenv("ALLOW_PRIVATE_HOSTS", f"127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
