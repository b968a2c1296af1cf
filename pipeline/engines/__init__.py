"""Samplers and scorers: transformers, vLLM, and served models."""
