"""redpen: on-policy distillation in two phases that meet in a cache on disk."""

from pipeline.environment import set_environment

__version__ = "0.1.0"

set_environment()
