"""Views of a graph: a tree of text and an SVG picture."""
