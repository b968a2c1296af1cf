"""Teachers with another tokenizer or prompt rendering."""
