"""Triton kernels, one file per op; installed as pycircuit.kernels."""
