"""pycircuit inside other tools. Each module imports its tool when it is used, and says how to install it."""
