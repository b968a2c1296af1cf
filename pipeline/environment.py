"""Environment variables: those redpen sets for its libraries, and those torchrun sets for redpen."""

from __future__ import annotations

import os

#: No telemetry, and no warnings of tokenizers about forks. Waiting OpenMP threads sleep: on a busy machine,
#: spinning ones made scoring on the CPU ten times slower.
ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_ERROR_REPORTING": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # vLLM's start causes warnings that users cannot act on
}

#: Number of processes in the torchrun job, and the number of this one; 1 and 0 without torchrun.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0")) if WORLD_SIZE > 1 else 0
