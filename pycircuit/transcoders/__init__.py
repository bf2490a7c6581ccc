"""Transcoders in memory, per layer and cross layer."""

from .types import CrossLayerTranscoder, PerLayerTranscoders, Transcoders

__all__ = ["CrossLayerTranscoder", "PerLayerTranscoders", "Transcoders"]
