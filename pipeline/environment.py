"""What redpen tells its libraries through the environment, and what torchrun tells redpen."""

from __future__ import annotations

import os

#: No library reports home, and the tokenizer's threads do not complain about forks. OpenMP threads that wait do not
#: spin: on a machine with other work, spinning made scoring on the CPU ten times slower.
ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_ERROR_REPORTING": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # its warnings are for programmers; vLLM's start sets some off
}

#: This process among those of its torchrun job.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0")) if WORLD_SIZE > 1 else 0
