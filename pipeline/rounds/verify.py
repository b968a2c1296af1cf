"""`redpen verify CACHE`: check every committed block against its digests, and invalidate what is wrong."""

from __future__ import annotations

from contextlib import nullcontext

import cache_schema as cs
from pipeline.console import progress, show


def run(url: str, repair: bool) -> int:
    """Print a line for each fault of a cache; 1 if there is any that was not repaired, else 0."""
    cache = cs.open(url, writable=repair)
    with cache.lock("redpen verify --repair") if repair else nullcontext():
        groups = cs.block_groups(cache)
        total = sum(group.n_blocks for group in groups)
        with progress("verify", total) as bar:
            findings = list(cs.verify(cache, progress=bar.advance))
        for finding in findings:
            show(str(finding))
        repaired = cs.repair(cache, findings) if repair else 0
    if not findings:
        committed = sum(int(group.committed().sum()) for group in groups)
        show(f"{url}: {committed} of {total} blocks are committed, no errors found")
        return 0
    beyond = sum(finding.block is None for finding in findings)
    if not repair:
        remedy = "" if beyond == len(findings) else f"; `redpen verify {url} --repair` invalidates the bad blocks"
        show(f"findings: {len(findings)}{remedy}")
        return 1
    show(f"invalidated blocks: {repaired}; run the same stages again to rewrite them")
    if beyond:
        show(f"beyond repair: {beyond} of the findings; restore the cache from a copy, or make a new one")
    return 1 if beyond else 0
