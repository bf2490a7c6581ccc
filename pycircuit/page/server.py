"""`pc.serve`: the page's server, in a thread of its own."""

from __future__ import annotations

import contextvars
import errno
import os
import socket
import threading
import time
import webbrowser
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pycircuit.model import ReplacementModel
from pycircuit.transcoders import Transcoders

from .graph_folder import GraphFolder

PORT = 8765
_PORTS_TRIED = 100
SHORTEST_TOKEN = 16
_STOP_SECONDS = 5.0


class PageServer:
    """A running server. address: what to open in a browser; stop() ends it; wait() blocks until it ends."""

    def __init__(self, site: Any, sockets: list[socket.socket], address: str) -> None:
        import uvicorn

        self.address = address
        self.site = site
        config = uvicorn.Config(
            site.app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            ws="none",
            http="h11",
            proxy_headers=False,
            limit_concurrency=200,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=1 << 16,
        )
        self._server = uvicorn.Server(config)
        context = contextvars.copy_context()  # pc.use(...) of the caller holds in the server's threads
        self._thread = threading.Thread(
            target=context.run, args=(self._server.run, sockets), name="pycircuit-page", daemon=True
        )
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.005)
        if not self._thread.is_alive():
            raise RuntimeError("serve: the server must start, got an error that uvicorn has printed")

    def stop(self) -> None:
        """End the server and its traces."""
        self.site.close()
        self._server.should_exit = True
        self._thread.join(_STOP_SECONDS)
        self._server.force_exit = True

    def wait(self) -> None:
        """Block until the server ends; Ctrl-C ends it."""
        try:
            while self._thread.is_alive():
                self._thread.join(0.5)
        except KeyboardInterrupt:
            self.stop()

    def __enter__(self) -> PageServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"PageServer({self.address})"


def serve(
    source: str | os.PathLike[str] | ReplacementModel,
    transcoders: str | os.PathLike[str] | Transcoders | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    examples: str | os.PathLike[str] | None = None,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    token: str | None = None,
    block: bool = False,
    browser: bool = False,
) -> PageServer:
    """Open a folder of graphs, or a model, in a browser: `serve("graphs")`, `serve("demo")`, `serve(model)`.

    source: a folder of graphs, or a model as of `pc.load`, with its transcoders. folder: the graphs of a model, made if
    it is not there; None for "graphs". examples: a folder that pc.write_examples wrote. name: the model's on the page.
    host: an address that other machines reach demands a token, 16 characters or more. port: None for 8765 or the next
    that is free. block: wait until the server ends. browser: open the page.
    """
    _require_extra()
    from .served_model import ServedModel
    from .site import Site

    access_host, token = _checked_access(host, token)
    model, graphs = _opened(source, transcoders, folder)
    served = None if model is None else ServedModel(model, name or _model_name(source, model))
    listener = _listener(access_host, port)
    bound_port = int(listener.getsockname()[1])
    try:
        site = Site(graphs, served, None if examples is None else Path(examples), access_host, bound_port, token)
    except BaseException:
        listener.close()
        raise
    written_host = f"[{access_host}]" if ":" in access_host else access_host
    address = f"http://{written_host}:{bound_port}/" + (f"?token={token}" if token else "")
    page = PageServer(site, [listener], address)
    if browser:
        webbrowser.open(address)
    if block:
        page.wait()
    return page


def _require_extra() -> None:
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"serve: {' and '.join(missing)} must be installed, got none; pip install 'pycircuit[page]'"
        )


def _checked_access(host: str, token: str | None) -> tuple[str, str | None]:
    """Return host and token, once they are known to go together."""
    if token is not None and (
        len(token) < SHORTEST_TOKEN or not all(c.isascii() and (c.isalnum() or c in "-._~") for c in token)
    ):
        raise ValueError(
            f"serve: token must have at least {SHORTEST_TOKEN} letters and digits, got {len(token)} characters"
        )
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise ValueError(f"serve: host must be an address of this machine, got {host!r}: {error}") from None
    local = all(address == "::1" or address.startswith("127.") for address in addresses)
    if not local and token is None:
        raise ValueError(f"serve: token must be given for a host that other machines reach, got host {host!r} alone")
    return host, token


def _opened(
    source: Any, transcoders: Any, folder: str | os.PathLike[str] | None
) -> tuple[ReplacementModel | None, GraphFolder]:
    """Return the model, if there is one, and the folder of its graphs."""
    from pycircuit.model import ReplacementModel

    is_path = isinstance(source, str | os.PathLike)
    if is_path and transcoders is None and Path(source).is_dir():
        if folder is not None:
            raise ValueError(f"serve: folder must go with a model, got {os.fspath(folder)} beside a folder of graphs")
        return None, GraphFolder(source)
    if isinstance(source, ReplacementModel):
        model = source
    elif is_path:
        from pycircuit.loading import load

        if transcoders is None and source != "demo":
            raise FileNotFoundError(
                f"serve: source must be a folder of graphs or, with transcoders, a model, got {os.fspath(source)!r}"
            )
        model = load(source, transcoders)
    else:
        raise TypeError(f"serve: source must be a folder or a model, got {type(source).__name__}")
    path = Path("graphs" if folder is None else folder)
    if path.parent.is_dir() and not path.exists():
        path.mkdir()
    return model, GraphFolder(path, model.tokenizer)


def _model_name(source: Any, model: ReplacementModel) -> str:
    path = str(getattr(model.hf_model.config, "_name_or_path", ""))
    return str(source) if isinstance(source, str) else path or model.family.model_type


def _listener(host: str, port: int | None) -> socket.socket:
    """Return a socket that listens at the port, or, without one, at 8765 or the next that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports = range(PORT, PORT + _PORTS_TRIED) if port is None else [port]
    for candidate in ports:
        listener = socket.socket(family, socket.SOCK_STREAM)
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen(128)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE or candidate == ports[-1]:
                raise OSError(f"serve: port must be one that is free, got {candidate}: {error.strerror}") from None
        else:
            with suppress(OSError):
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return listener
    raise AssertionError("a port is returned or an error raised")
