"""Device functions that several kernels share. This package launches nothing."""
