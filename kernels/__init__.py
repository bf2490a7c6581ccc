"""Triton kernels, one file an op; installed as pycircuit.kernels."""
