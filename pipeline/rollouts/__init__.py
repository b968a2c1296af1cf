"""Stage one: sampling."""
