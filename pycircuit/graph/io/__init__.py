"""Graphs in files, and in the arrays of other libraries."""
