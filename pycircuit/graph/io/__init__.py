"""Files of graphs, and graphs of other libraries."""
