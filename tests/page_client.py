"""A running page server for the tests, and requests to it over real sockets."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pycircuit as pc

EDITS = {"X-Pycircuit": "1", "Content-Type": "application/json"}


class Client:
    """Requests to one server."""

    def __init__(self, page: pc.PageServer, headers: dict[str, str] | None = None) -> None:
        self.page, self.headers = page, headers or {}
        self.host, _, port = page.address.split("/")[2].rpartition(":")
        self.port = int(port)

    def raw(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a request."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=20)
        try:
            connection.request(method, path, body, {**self.headers, **(headers or {})})
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    def call(self, method: str, path: str, content: Any = None) -> tuple[int, Any]:
        """(status, content) of a request as the page makes it."""
        body = None if content is None else json.dumps(content).encode()
        status, _, answer = self.raw(method, path, body, {} if method == "GET" else EDITS)
        return status, json.loads(answer) if answer else None

    def get(self, path: str) -> Any:
        """Content of a GET that must succeed."""
        status, content = self.call("GET", path)
        assert status == 200, content
        return content

    def post(self, path: str, content: Any = None, method: str = "POST") -> Any:
        """Content of a POST that must succeed."""
        status, content = self.call(method, path, {} if content is None else content)
        assert status == 200, content
        return content


@contextmanager
def serving(source: str | Path | pc.ReplacementModel, **options: Any) -> Iterator[Client]:
    """Serve a folder or a model at a free port."""
    with pc.serve(source, port=0, **options) as page:
        yield Client(page)
