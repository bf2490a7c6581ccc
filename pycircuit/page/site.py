"""Routes of the page's server: addresses and methods to answers."""

from __future__ import annotations

import functools
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from .answers import Answers
from .edits import EditConflict
from .graph_folder import GraphFolder, message_of
from .guard import LOCAL_NAMES, Access, Guard
from .json_bytes import Download, encoded
from .tracing_queue import QueueFull

if TYPE_CHECKING:
    from .served_model import ServedModel

STATIC = Path(__file__).parent / "static"


class Site:
    """The server's application, and what it keeps: graphs, edits, model, traces."""

    def __init__(
        self,
        graphs: GraphFolder,
        model: ServedModel | None,
        examples: Path | None,
        host: str,
        port: int,
        token: str | None,
    ) -> None:
        self.answers = Answers(graphs, model, examples)
        local = host in LOCAL_NAMES or host.startswith("127.")
        names = {
            *LOCAL_NAMES,
            host.lower(),
            *(() if local else (socket.gethostname().lower(), socket.getfqdn().lower())),
        }
        access = Access(frozenset(names), not local, token, f"pycircuit-{port}")
        app = Starlette(routes=self._routes(), exception_handlers={HTTPException: _http_error, Exception: _unexpected})
        app.router.redirect_slashes = False
        self.app = Guard(app, access)

    def close(self) -> None:
        """End what runs."""
        self.answers.close()

    def _routes(self) -> list[Route | Mount]:
        a = self.answers
        graph = "/api/graphs/{name}"
        table: list[tuple[str, str, Callable[..., Any]]] = [
            ("GET", "/api/state", a.state),
            ("GET", graph, a.view),
            ("GET", f"{graph}/node", a.node),
            ("GET", f"{graph}/paths", a.paths),
            ("GET", f"{graph}/search", a.search),
            ("GET", f"{graph}/edits", a.edits),
            ("PUT", f"{graph}/edits", a.replace_edits),
            ("POST", f"{graph}/edits/undo", a.undo),
            ("POST", f"{graph}/edits/redo", a.redo),
            ("POST", f"{graph}/edges", a.edges),
            ("POST", f"{graph}/trace-after", a.trace_after),
            ("POST", f"{graph}/scores", a.scores),
            ("POST", f"{graph}/group", a.group),
            ("GET", "/api/compare", a.compare),
            ("GET", f"{graph}/export.json", a.export),
            ("POST", f"{graph}/import", a.import_link),
            ("POST", f"{graph}/intervene", a.intervene),
            ("GET", "/api/features/{layer}/{feature}", a.feature),
            ("POST", "/api/estimate", a.estimate),
            ("POST", "/api/traces", a.trace),
            ("GET", "/api/traces/{id}/events", a.trace_events),
            ("DELETE", "/api/traces/{id}", a.cancel_trace),
        ]
        methods: dict[str, dict[str, Callable[..., Any]]] = {}
        for method, path, handler in table:
            methods.setdefault(path, {})[method] = handler
        routes: list[Route | Mount] = [
            Route(path, _endpoint(handlers), methods=list(handlers)) for path, handlers in methods.items()
        ]
        routes += [Route(path, _no_such_address) for path in ("/api", "/api/{path:path}")]
        if STATIC.is_dir():
            routes.append(Mount("/", StaticFiles(directory=STATIC, html=True)))
        else:
            routes.append(Route("/", _no_page))
        return routes


def _endpoint(handlers: dict[str, Callable[..., Any]]) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint of an address: its handlers run in threads, and give bytes of JSON or what becomes JSON."""

    async def endpoint(request: Request) -> Response:
        handler = handlers["GET" if request.method == "HEAD" else request.method]
        body = await request.body()
        call = functools.partial(_call, handler, request.path_params, dict(request.query_params), body)
        status, content = await run_in_threadpool(call)
        if isinstance(content, Response):
            return content
        if isinstance(content, Download):
            disposition = f"attachment; filename*=UTF-8''{quote(content.name)}"
            headers = {"cache-control": "no-store", "content-disposition": disposition}
            return Response(content.content, status, headers, "application/json")
        return Response(content, status, {"cache-control": "no-store"}, "application/json")

    return endpoint


def _call(
    handler: Callable[..., Any], path: dict[str, Any], query: dict[str, str], body: bytes
) -> tuple[int, bytes | Download | Response]:
    """Run a handler and return status and content; errors of what was asked become answers."""
    try:
        content = handler(path, query, _parsed(body))
    except EditConflict as conflict:
        return 409, encoded({"error": str(conflict), **conflict.state})
    except QueueFull as error:
        return 429, encoded({"error": str(error)})
    except (KeyError, FileNotFoundError) as error:
        return 404, encoded({"error": message_of(error)})
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        return 400, encoded({"error": message_of(error)})
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        return 500, encoded({"error": message_of(error)})
    return 200, content if isinstance(content, bytes | Download | Response) else encoded(content)


def _parsed(body: bytes) -> dict[str, Any]:
    """Object of a body of JSON, empty without one."""
    if not body:
        return {}
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"page: a body must be JSON, got: {message_of(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"page: a body must be an object, got {type(content).__name__}")
    return content


async def _no_such_address(request: Request) -> Response:
    return Response(encoded({"error": "page: no such address"}), 404, media_type="application/json")


async def _no_page(request: Request) -> Response:
    return Response("The page's files are not built; see CONTRIBUTING.md.", 503, media_type="text/plain")


async def _http_error(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 500)
    headers = getattr(error, "headers", None)
    return Response(encoded({"error": str(getattr(error, "detail", error))}), status, headers, "application/json")


async def _unexpected(request: Request, error: Exception) -> Response:
    return Response(encoded({"error": f"page: {type(error).__name__}"}), 500, media_type="application/json")
