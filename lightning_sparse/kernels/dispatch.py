"""Which code computes: torch's anywhere, other code on the tensors that it suits, where its extra is installed.

``LIGHTNING_SPARSE_KERNELS=torch`` (or ``numba``) forces one of them. ``fused``, which GPUs take, is no other code for a
tensor: all weights of an optimizer are computed with at once. It can be forced on a CPU, too, to be looked at.
"""

import importlib
import os
from functools import cache
from typing import Any, NamedTuple

import torch

__all__ = ["BACKENDS", "DENSE", "Backend", "candidates", "chosen", "is_fused", "module", "wanted"]

#: the name, among those of backends, for layers that compute with a dense weight; it multiplies no sparse matrix
DENSE = "dense"


class Backend(NamedTuple):
    """Code beside torch's, in the modules ``KIND_NAME``, such as ``thresholds_numba``.

    Attributes:
        name: of it, also in the environment.
        device: type of the device that it computes on.
        dtypes: of the tensors that it takes.
        package: that it needs.
        install: what brings that package, for ``pip install``.
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    package: str
    install: str

    def suits(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Tell whether it computes on such tensors."""
        return device.type == self.device and dtype in self.dtypes


_NUMBA = Backend("numba", "cpu", (torch.float32, torch.float64), "numba", install="'lightning-sparse[fast]'")
_TRITON = Backend("triton", "cuda", (torch.float32, torch.bfloat16, torch.float16), "triton", install="triton")

#: what there is beside torch's code, the quicker first; a new one is a line here, and a file
BACKENDS: dict[str, tuple[Backend, ...]] = {
    "thresholds": (_NUMBA,),
    "products": (_NUMBA,),
    "blocks": (_NUMBA, _TRITON),
    "positions": (_NUMBA._replace(dtypes=(torch.int32, torch.int64, torch.float32, torch.float64, torch.bool)),),
    "convolutions": (_NUMBA,),
}


def candidates(kind: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the modules that compute on such tensors, by name; the first is the quicker one as a rule.

    Args:
        kind: a key of ``BACKENDS``.
        device: of the tensors.
        dtype: of them.

    Raises:
        ImportError: the environment asks for code whose package is not installed.
        ValueError: it asks for what there is not.
    """
    suiting = [backend for backend in BACKENDS[kind] if backend.suits(device, dtype)]
    found = {backend.name: code for backend in suiting if (code := module(kind, backend)) is not None}
    return found if found and wanted() in found else {**found, "torch": _torch(kind)}


def chosen(kind: str, device: torch.device, dtype: torch.dtype, name: str | None = None) -> Any:
    """Return the module of this name that computes on such tensors, or the first of the candidates if it is none.

    Args:
        kind: a key of ``BACKENDS``.
        device: of the tensors.
        dtype: of them.
        name: of a backend; None: the first.

    Raises:
        ValueError: there is no backend of this name anywhere.
    """
    found = candidates(kind, device, dtype)
    known = ["torch", *(backend.name for backend in BACKENDS[kind]), DENSE]
    if name is not None and name not in known:
        raise ValueError(f"backend must be one of {known}, or None for the quicker one, got {name!r}.")
    return found[name if name in found else next(iter(found))]


@cache
def module(kind: str, backend: Backend) -> Any:
    """Return the module of a backend, or None where it is not wanted or not installed."""
    asked = wanted()
    if asked not in ("auto", backend.name):
        return None
    try:
        return importlib.import_module(f"lightning_sparse.kernels.{kind}_{backend.name}")
    except ImportError as error:
        if asked == backend.name:
            raise ImportError(
                f"LIGHTNING_SPARSE_KERNELS={backend.name} needs {backend.package}: pip install {backend.install}"
            ) from error
        return None


def is_fused(device: torch.device) -> bool:
    """Tell whether all weights of an optimizer are computed with at once, for the number of launches to be small."""
    return wanted() == "fused" or (wanted() == "auto" and device.type != "cpu")


def wanted() -> str:
    """Return which code the environment asks for: ``"auto"``, or the name of one."""
    return _known(os.environ.get("LIGHTNING_SPARSE_KERNELS", "auto"))


@cache
def _known(found: str) -> str:
    """Return the name of some code if there is such code; each step asks for it many times."""
    others = [backend.name for backends in BACKENDS.values() for backend in backends]
    names = list(dict.fromkeys(["auto", "torch", *others, "fused"]))
    if found not in names:
        known = f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"
        raise ValueError(f"LIGHTNING_SPARSE_KERNELS must be {known}, got {found!r}.")
    return found


@cache
def _torch(kind: str) -> Any:
    return importlib.import_module(f"lightning_sparse.kernels.{kind}_torch")
