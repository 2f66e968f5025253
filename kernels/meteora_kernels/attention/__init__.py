"""Kernels of a server's attention: one token of each text against its stored keys and values, and rotary positions."""
