"""Rotary frequencies (Su et al. 2021, arXiv 2104.09864, section 3.4.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/N) for i in [0, N/2): [N/2] float32, whatever the model's dtype."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return (1.0 / theta**exponents).to(device)
