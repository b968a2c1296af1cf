"""Stage one: scoring."""
