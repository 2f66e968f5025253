"""Device functions that several kernels share; nothing here is launched."""
