"""The file ``sparsity.json``: its name and format, what it says of a run beside its epochs, how it is written."""

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightning_sparse.compat.lightning import PACKAGE, Trainer, rank_zero_warn

__all__ = ["FILE", "FORMAT", "RunFile", "hardware", "now", "seed", "versions", "write"]

#: name of the file in the log directory
FILE = "sparsity.json"
#: number of what is in it, for those who read it
FORMAT = 1


class RunFile:
    """The file of one run, with the time that the run has taken.

    Attributes:
        path: where it is written; None: not by this process.
        head: what the file says of the run; empty before the first step.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.head: dict[str, Any] = {}
        self._fit_began = time.monotonic()
        self._started = now()
        self._earlier = 0.0  # seconds that the run took before it was resumed

    def write(self, status: str, epochs: Iterable[str], pictures: Mapping[str, Any]) -> None:
        """Write the file; a run goes on if that fails.

        Args:
            status: of the run.
            epochs: records, as JSON.
            pictures: of the masks, as ``layer.picture`` returns them.
        """
        if self.path is None:
            return
        head = {
            "format": FORMAT,
            "status": status,
            "started": self._started,
            "updated": now(),
            "wall_time_s": round(self._wall_time(), 3),
            **self.head,
        }
        # records and pictures are JSON already, so that a long history costs little each time
        masks = ", ".join(f"{json.dumps(name)}: {picture['json']}" for name, picture in pictures.items())
        text = json.dumps(head, default=str)[:-1] + f', "epochs": [{", ".join(epochs)}], "masks": {{{masks}}}}}\n'
        try:
            write(self.path, text)
        except OSError as error:
            rank_zero_warn(f"SparsityMonitor cannot write {self.path}: {error}. The run continues without the file.")
            self.path = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"started": self._started, "wall_time_s": self._wall_time()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what a checkpoint has kept."""
        self._started, self._earlier = state_dict["started"], state_dict["wall_time_s"]

    def _wall_time(self) -> float:
        return self._earlier + time.monotonic() - self._fit_began


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
