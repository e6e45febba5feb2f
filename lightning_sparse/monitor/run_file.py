"""The file ``sparsity.json``: its name and format, what it says of a run beside its epochs, how it is written."""

import os
import platform
import sys
import tempfile
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightning_sparse.compat.lightning import PACKAGE, Trainer

__all__ = ["FILE", "FORMAT", "hardware", "now", "seed", "versions", "write"]

#: name of the file in the log directory
FILE = "sparsity.json"
#: number of what is in it, for those who read it
FORMAT = 1


def now() -> str:
    """Return the time in ISO 8601, with its zone."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def seed() -> int | None:
    """Return the seed that ``seed_everything`` was given, if it was called."""
    given = os.environ.get("PL_GLOBAL_SEED", "")
    return int(given) if given.isdigit() else None


def versions() -> dict[str, str | None]:
    """Return the versions of what a result depends on; None: not known."""
    return {
        "lightning_sparse": _version("lightning-sparse"),
        "torch": torch.__version__,
        "lightning": sys.modules[PACKAGE].__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def hardware(trainer: Trainer) -> dict[str, Any]:
    """Return what the run computes on."""
    device = trainer.strategy.root_device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
    }


def _processor() -> str | None:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def write(file: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's is for the owner alone
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
