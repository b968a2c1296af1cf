"""Prompts, answers and detokenization."""
