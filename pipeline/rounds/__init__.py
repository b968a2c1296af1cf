"""A round of a cache with its scores, as every stage reads it."""
