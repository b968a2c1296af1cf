"""redpen: on-policy distillation in two phases that meet in a cache on disk."""
