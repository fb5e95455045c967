"""Checkpoint files -> named tensors. Knows nothing of the engine."""
