"""`nulledit info`: versions, machine, caches, and what is known."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from nulledit.cli.command import Call, command


@command("Versions, devices, caches, recipes, models.")
def info(call: Call) -> None:
    """Versions, devices, caches and their size; recipes, models, architectures and methods known.

    \b
    $ nulledit info
    """
    call.prepare()
    found = collect()
    from nulledit.report.document import Items

    call.show(found, Items(tuple((name, _line(value)) for name, value in found.items())))


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} ({v})" if v else k for k, v in value.items())
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def collect() -> dict[str, Any]:
    """All that `info` shows, as plain data."""
    import torch
    import transformers

    from nulledit._version import __version__
    from nulledit.config import shipped_recipes
    from nulledit.io.files import cache_folder
    from nulledit.methods import METHODS
    from nulledit.models.embedded import EMBEDDED
    from nulledit.models.layouts import LAYOUTS

    cache = cache_folder()
    devices = {"cpu": f"{torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        devices[f"cuda:{i}"] = torch.cuda.get_device_name(i)
    if torch.backends.mps.is_available():
        devices["mps"] = ""
    return {
        "nulledit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": platform.platform(),
        "devices": devices,
        "cache": str(cache),
        "cached models": {f.name: _cached(f) for f in sorted(cache.glob("models/[!.]*"))},
        "cached statistics": {
            f.parent.name[:8] + "/" + f.name[:8]: size(f)
            for f in sorted(cache.glob("statistics/*/[!.]*"))
        },
        "recipes": shipped_recipes(),
        "models": {name: f"also {entry.hub} on the Hub" for name, entry in EMBEDDED.items()}
        | {
            "any Hub id or local folder": "of a known architecture, or one that tracing understands"
        },
        "architectures": sorted(LAYOUTS),
        "methods": {method.name: method.paper for method in METHODS},
    }


def _cached(folder: Path) -> str:
    """The size of a converted model, and the GGUF file that it is of."""
    from nulledit.models.gguf import source

    file, sha256 = source(folder)
    return ", ".join([size(folder), *[f"of {file}, sha256 {sha256}"] * bool(file)])


def size(folder: Path) -> str:
    """Bytes in a folder, readable."""
    count = float(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()))
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
