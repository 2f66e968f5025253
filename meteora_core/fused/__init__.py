"""Fused inference: linears that share their input run as one, base and adapters together."""
