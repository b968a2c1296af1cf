"""One toy run on a local cache and the same on S3, stage by stage: seconds, and what it asks of the server.

    python benchmarks/s3_trial.py [--latency-ms 20] [--prompts 64] [--per-block 4]

The server is moto on loopback, in Python, which takes about 3 ms a request of its own; a proxy before it counts the
requests and adds `--latency-ms` to each. Needs the extra `dev`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import s3_server

STAGES = ("rollouts", "score", "train", "verify", "inspect", "export-cache", "rollouts", "score")
SETTINGS = (
    "train.prompts_per_step=8",
    "train.steps=6",
    "train.lora_rank=4",
    "train.stop_reverse_kl=0",
)


def seconds(stage: str, cache: str, run: Path, settings: Sequence[str]) -> float:
    """Run one command; its wall time, imports included."""
    args = [stage, "toy", "--cache", cache] if stage in ("rollouts", "score", "train") else [stage, cache]
    if "toy" in args:
        args += [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    if stage == "export-cache":
        args += ["-o", str(run.with_suffix(".parquet"))]
    if stage == "train":
        args += ["--run", str(run)]
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "pipeline", *args], capture_output=True, text=True, env=os.environ)
    if done.returncode:
        sys.exit(f"{stage} on {cache} failed:\n{done.stderr}")
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--per-block", type=int, default=4, help="prompts of a block")
    args = parser.parse_args()
    settings = (f"prompts.limit={args.prompts}", f"rollouts.prompts_per_block={args.per_block}")
    with s3_server.serving() as proxy, tempfile.TemporaryDirectory() as directory:
        proxy.latency_seconds = args.latency_ms / 1000
        print(f"{'stage':10}{'local, s':>10}{'S3, s':>10}   requests ({-(-args.prompts // args.per_block)} blocks)")
        for stage in STAGES:
            local = seconds(stage, f"{directory}/local.zarr", Path(directory, "local"), settings)
            proxy.requests.clear()
            remote = seconds(stage, f"s3://{s3_server.BUCKET}/toy.zarr", Path(directory, "s3"), settings)
            asked = Counter(request.split()[0] for request in proxy.requests)
            recorded = ", ".join(f"{n} {method}" for method, n in sorted(asked.items()))
            print(f"{stage:10}{local:10.1f}{remote:10.1f}   {len(proxy.requests)}: {recorded}", flush=True)


if __name__ == "__main__":
    main()
