"""Resolving, loading and identifying models."""
