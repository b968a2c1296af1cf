"""Rounds of a cache: rollouts with their scores, and the figures computed from them."""
