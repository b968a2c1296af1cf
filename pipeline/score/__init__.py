"""Stage one, scoring (`redpen score`)."""
