"""Layers of a decoder: what is computed, in terms of a backend's operations."""
