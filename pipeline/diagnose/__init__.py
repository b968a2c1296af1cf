"""`redpen diagnose`: whether a pair will work, by its scored cache and before any gradient."""
