"""Transcoders, per layer and cross-layer: in memory, or with decoders left in their files."""

from .formats import recognise, register_format
from .io import convert, inspect, load, save
from .types import CrossLayerTranscoder, PerLayerTranscoders, Transcoders

__all__ = [
    "CrossLayerTranscoder",
    "PerLayerTranscoders",
    "Transcoders",
    "convert",
    "inspect",
    "load",
    "recognise",
    "register_format",
    "save",
]
