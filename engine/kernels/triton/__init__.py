"""The GPU kernels: jit functions only. Their launches are made in engine/backends/cuda."""
