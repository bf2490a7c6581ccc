"""Measurement: every op at the standard shapes, next to plain PyTorch and to this machine's own limits.

Works from a wheel: `python -m pycircuit.bench --op encode --shape small`, or `pycircuit bench`.
"""
