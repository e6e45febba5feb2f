"""Which Lightning this process uses: ``lightning.pytorch`` or ``pytorch_lightning``.

The two packages hold the same code under two names, and a callback of one does not belong in a Trainer of the other.
Whichever the user imported first is taken; ``LIGHTNING_SPARSE_BACKEND`` overrides the choice.
"""

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING

__all__ = [
    "BaseFinetuning",
    "Callback",
    "DDPStrategy",
    "DummyLogger",
    "LightningModule",
    "MisconfigurationException",
    "SingleDeviceStrategy",
    "StochasticWeightAveraging",
    "Trainer",
    "check_trainer",
    "is_overridden",
    "is_param_in_hook_signature",
    "isolate_rng",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _choose() -> str:
    """Name the package to build on."""
    forced = os.environ.get("LIGHTNING_SPARSE_BACKEND")
    if forced is not None:
        if forced not in _PACKAGES:
            raise ImportError(f"LIGHTNING_SPARSE_BACKEND must be one of {_PACKAGES}, got {forced!r}.")
        return forced
    for package in _PACKAGES:
        if package in sys.modules:
            return package
    return "lightning.pytorch" if importlib.util.find_spec("lightning") else "pytorch_lightning"


PACKAGE = _choose()

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
    from lightning.pytorch.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]
    from lightning.pytorch.utilities.model_helpers import is_overridden
    from lightning.pytorch.utilities.rank_zero import (  # type: ignore[attr-defined]
        rank_zero_info,
        rank_zero_only,
        rank_zero_warn,
    )
    from lightning.pytorch.utilities.seed import isolate_rng
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
else:
    _pl = importlib.import_module(PACKAGE)
    Callback, LightningModule, Trainer = _pl.Callback, _pl.LightningModule, _pl.Trainer
    _callbacks = importlib.import_module(f"{PACKAGE}.callbacks")
    BaseFinetuning, StochasticWeightAveraging = _callbacks.BaseFinetuning, _callbacks.StochasticWeightAveraging
    DummyLogger = importlib.import_module(f"{PACKAGE}.loggers.logger").DummyLogger
    _strategies = importlib.import_module(f"{PACKAGE}.strategies")
    DDPStrategy, SingleDeviceStrategy = _strategies.DDPStrategy, _strategies.SingleDeviceStrategy
    MisconfigurationException = importlib.import_module(f"{PACKAGE}.utilities.exceptions").MisconfigurationException
    _rank_zero = importlib.import_module(f"{PACKAGE}.utilities.rank_zero")
    rank_zero_info, rank_zero_warn = _rank_zero.rank_zero_info, _rank_zero.rank_zero_warn
    rank_zero_only = _rank_zero.rank_zero_only
    is_overridden = importlib.import_module(f"{PACKAGE}.utilities.model_helpers").is_overridden
    isolate_rng = importlib.import_module(f"{PACKAGE}.utilities.seed").isolate_rng
    _signatures = importlib.import_module(f"{PACKAGE}.utilities.signature_utils")
    is_param_in_hook_signature = _signatures.is_param_in_hook_signature


def check_trainer(trainer: object, callback: object) -> None:
    """Raise if ``trainer`` comes from the package that ``callback`` was not built on."""
    if isinstance(trainer, Trainer):
        return
    theirs = type(trainer).__module__.split(".trainer")[0]
    raise MisconfigurationException(
        f"{type(callback).__name__} is a callback of {PACKAGE!r}, but the Trainer comes from {theirs!r}: "
        "the two packages cannot be mixed. Import only one of them in the program, or set the environment variable "
        f"LIGHTNING_SPARSE_BACKEND={theirs} before lightning_sparse is imported."
    )
