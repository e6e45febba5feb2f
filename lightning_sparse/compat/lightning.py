"""Lightning under its two names: ``lightning.pytorch`` and ``pytorch_lightning``.

The two packages hold the same code, and a program may load both, as where it uses a library built on the other one.
A callback of this package belongs in the Trainers of both: it is an instance of the ``Callback`` of each that is
loaded, and asks what it is given by name (``is_a``). Helpers, and the base classes of the zoo, come from one of them,
``PACKAGE``: the first that the program has imported; ``LIGHTNING_SPARSE_BACKEND`` overrides that. No package is
imported beside one that is there.
"""

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

__all__ = [
    "PACKAGE",
    "Callback",
    "CombinedLoader",
    "DummyLogger",
    "LightningModule",
    "MisconfigurationException",
    "Trainer",
    "is_a",
    "is_overridden",
    "is_param_in_hook_signature",
    "isolate_rng",
    "parent",
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
    for name in sys.modules:  # in the order in which they were imported
        if name in _PACKAGES:
            return name
    return "lightning.pytorch" if importlib.util.find_spec("lightning") else "pytorch_lightning"


PACKAGE = _choose()

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.utilities import CombinedLoader
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
    LightningModule, Trainer = _pl.LightningModule, _pl.Trainer
    DummyLogger = importlib.import_module(f"{PACKAGE}.loggers.logger").DummyLogger
    _exceptions = importlib.import_module(f"{PACKAGE}.utilities.exceptions")
    CombinedLoader = importlib.import_module(f"{PACKAGE}.utilities").CombinedLoader
    _rank_zero = importlib.import_module(f"{PACKAGE}.utilities.rank_zero")
    rank_zero_info, rank_zero_warn = _rank_zero.rank_zero_info, _rank_zero.rank_zero_warn
    rank_zero_only = _rank_zero.rank_zero_only
    is_overridden = importlib.import_module(f"{PACKAGE}.utilities.model_helpers").is_overridden
    isolate_rng = importlib.import_module(f"{PACKAGE}.utilities.seed").isolate_rng
    _signatures = importlib.import_module(f"{PACKAGE}.utilities.signature_utils")
    is_param_in_hook_signature = _signatures.is_param_in_hook_signature

    class MisconfigurationException(_exceptions.MisconfigurationException):
        """The error of this name of each package that is loaded."""

    class Callback(_pl.Callback):
        """A callback of each package that is loaded."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            """Belong to a package that has been imported since."""
            _join_loaded()
            return super().__new__(cls)

    def _join_loaded() -> None:
        """Make the classes above those of all packages that are loaded."""
        for package in [name for name in _PACKAGES if hasattr(sys.modules.get(name), "Callback")]:
            exceptions = sys.modules[f"{package}.utilities.exceptions"]
            for ours, theirs in (
                (Callback, sys.modules[package].Callback),
                (MisconfigurationException, exceptions.MisconfigurationException),
            ):
                if not issubclass(ours, theirs):
                    ours.__bases__ = (*ours.__bases__, theirs)

    _join_loaded()


def is_a(thing: object, *names: str) -> bool:
    """Tell whether an object is of a class of Lightning with one of these names, in either package."""
    return parent(thing, *names) is not None


def parent(thing: object, *names: str) -> type | None:
    """Return the class of Lightning with one of these names that an object is of, in either package."""
    kinds = [kind for kind in type(thing).__mro__ if kind.__name__ in names]
    return next((kind for kind in kinds if kind.__module__.split(".")[0] in ("lightning", "pytorch_lightning")), None)
