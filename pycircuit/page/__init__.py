"""The page: a server for graphs in a browser. `views` makes its data from arrays alone, without a server."""

from .server import PageServer, serve

__all__ = ["PageServer", "serve"]
