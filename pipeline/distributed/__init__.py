"""Several processes: ranks, Ray workers, FSDP, signals."""
