"""Kernels for the modules right before fused groups, which write where the group reads."""
