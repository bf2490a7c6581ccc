"""The page: a server for graphs in a browser. `views` makes its data from arrays alone, without a server."""
