"""Triton kernels. They know pointers and tiles, not graphs."""
