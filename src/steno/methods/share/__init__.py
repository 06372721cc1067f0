"""Sharers: segments of neighbouring layers out of common tensors."""
