"""Benchmarks of every op at the standard shapes, beside plain PyTorch and the limits of this machine.

Works from a wheel: `python -m pycircuit.bench --op encode --shape small`, or `pycircuit bench`.
"""
