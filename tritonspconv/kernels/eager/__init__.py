"""The kernels in vectorised torch, for any device and dimension."""
