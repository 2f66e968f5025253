"""Kernels for the modules right before fused groups, which write their output directly into the buffer that the group reads."""
