"""Every setting of a recipe, its bounds, and reading it from TOML."""
