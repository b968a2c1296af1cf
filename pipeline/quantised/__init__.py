"""Quantised checkpoints: which tensors make a weight, and how it is dequantised."""
