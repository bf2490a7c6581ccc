"""Layouts of transcoders on disk: recognised from their files, read with decoders left there, written anew."""

from .contents import Contents, Layer
from .detect import FORMATS, Format, Recognised, recognise, register_format
from .report import Report
from .select import Overrides

__all__ = [
    "FORMATS",
    "Contents",
    "Format",
    "Layer",
    "Overrides",
    "Recognised",
    "Report",
    "recognise",
    "register_format",
]
