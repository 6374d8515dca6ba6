"""Whether the Hub can be asked."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from rmt_lightning.core import hub


@contextmanager
def answering(status: int) -> Iterator[str]:
    """The address of a server that answers every request with one status."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.fault("the Hub is down", "one line within seconds")
@pytest.mark.parametrize("status", [200, 302, 404, 500, 502, 503, 504])
def test_who_answers_that_it_is_down_cannot_be_asked(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(status) as address:
        monkeypatch.setattr(hub.constants, "ENDPOINT", address)
        assert hub.out_of_reach("x") == (f"{address} answers with {status}" if status >= 500 else "")


@pytest.mark.fault("the Hub takes requests and never answers", "one line within seconds")
def test_who_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        assert "does not answer: " in hub.out_of_reach("x")
        assert time.monotonic() - began < 5
