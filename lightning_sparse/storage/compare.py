"""Whether a module computes with sparse layers what it computes with dense ones: one batch through copies of both.

Code may treat layers by their exact type, or parameters by their number of elements. Then it computes something else
with sparse layers, and says nothing. So the first batch of a fit goes through two copies of the module, one as it is
and one with its layers made dense. In the second, layers return what the sparse ones do for the same input, so that
rounding does not grow from layer to layer, and all that is left to differ is the code outside of them.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_sparse.compat.lightning import LightningModule, MisconfigurationException, Trainer, rank_zero_info
from lightning_sparse.compat.nested import tensors
from lightning_sparse.layers.sparse import SparseLayer, make_dense_, sparse_layers
from lightning_sparse.trainer.probe import probing
from lightning_sparse.trainer.verbs import Verbs

__all__ = ["COMPARED_LIMIT", "difference", "refuse_difference"]

#: bytes of the module's tensors and the dense weights up to which a fit compares
COMPARED_LIMIT = 192 << 20

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative, of what is computed in the same way
_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-3}  # of a product, over the norms of its factors; TF32 on a GPU
_COARSE = 0.05  # both, in lower precision


class _Figures(NamedTuple):
    """What is kept of a tensor."""

    sum: float
    norm: float
    size: int
    tolerance: float

    def near(self, other: "_Figures") -> bool:
        """Tell whether two tensors may be the same but for rounding."""
        if not all(map(math.isfinite, (self.sum, self.norm, other.sum, other.norm))):
            return repr(self) == repr(other)
        bound = self.tolerance * self.norm + 1e-12
        sums = abs(self.sum - other.sum) <= bound * math.sqrt(self.size)
        return self.size == other.size and sums and abs(self.norm - other.norm) <= bound


class _Call(NamedTuple):
    """A call of a layer by its name, with what enters it; or, without a name, what the step returns."""

    name: str
    figures: list[_Figures]

    def near(self, other: "_Call") -> bool:
        """Tell whether both are the same but for rounding."""
        same = self.name == other.name and len(self.figures) == len(other.figures)
        return same and all(a.near(b) for a, b in zip(self.figures, other.figures, strict=True))


def refuse_difference(method: Verbs, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
    """Raise if a module with sparse layers computes something else than with dense ones, here or on another process."""
    found = difference(trainer, module, batch, index)
    if not trainer.strategy.reduce_boolean_decision(found is None):
        raise MisconfigurationException(
            f"{method!r} must not change what {type(module).__name__} computes, but on the first batch "
            f"{found or 'another process finds that something'} with sparse layers, compared with dense ones of "
            "the same weights. Code that goes by type(layer) or by the number of a parameter's elements does so. "
            "Ask isinstance(layer, nn.Linear) there, keep the layer dense with exclude=[...], or use "
            "storage='masked'."
        )


def difference(trainer: Trainer, module: LightningModule, batch: Any, index: int) -> str | None:
    """Return where a module with sparse layers computes something else than the dense one, in words; None: nowhere.

    Nothing of the run changes: copies compute, random generators and loggers are as before. None also where there is
    nothing to compare: ``training_step`` fails on a copy, or gives two results for the same batch.
    """
    try:
        ours, theirs = _calls(trainer, module, batch, index, False), _calls(trainer, module, batch, index, True)
        found = _first(ours, theirs)
        if found is not None and _first(ours, _calls(trainer, module, batch, index, False)) is not None:
            raise ArithmeticError("training_step computes something else each time")
    except _Differs as error:
        return str(error)
    except Exception as error:  # of foreign code, or memory
        rank_zero_info(
            f"Sparse layers: {type(module).__name__} could not be compared with the dense module, since "
            f"training_step failed on a copy before the first step ({type(error).__name__}: {error})."
        )
        return None
    return found


class _Differs(Exception):  # noqa: N818  (no error of the program)
    """A layer computes something else than the dense one."""


def _calls(trainer: Trainer, module: LightningModule, batch: Any, index: int, dense: bool) -> list[_Call]:
    """Return the calls of layers in a step of a copy, whose layers are made ``dense`` before, and what it returns."""
    calls: list[_Call] = []
    with probing(trainer, module, []) as probe:
        for name, layer in sparse_layers(probe.module).items():
            twin = copy.deepcopy(layer) if dense else None
            if dense:
                make_dense_(layer)
            layer.register_forward_hook(partial(_called, calls, name, twin), with_kwargs=True)
        calls.append(_call("", tensors(probe.output(copy.deepcopy(batch), index))))
    return calls


def _called(
    calls: list[_Call], name: str, twin: SparseLayer | None, layer: Any, args: Any, kwargs: Any, output: Tensor
) -> Tensor:
    """Note a call; return what the sparse ``twin`` of a dense layer does."""
    x = args[0] if args else kwargs["input"]
    calls.append(_call(name, [x]))
    if twin is None:
        return output
    result: Tensor = twin.forward(x)
    with torch.no_grad():
        rounding = _ROUNDING.get(output.dtype, _COARSE) * (_norm(x) * _norm(twin.values) + _norm(output))
        if result.shape != output.shape or _norm(result - output) > rounding:
            raise _Differs(f"{name} returns something else for the same input")
    return result


def _call(name: str, found: Iterable[Tensor]) -> _Call:
    return _Call(name, [_figures(x.detach()) for x in found if x.is_floating_point()])


def _figures(x: Tensor) -> _Figures:
    return _Figures(float(x.sum(dtype=torch.float64)), _norm(x), x.numel(), _TOLERANCE.get(x.dtype, _COARSE))


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)))


def _first(ours: Sequence[_Call], theirs: Sequence[_Call]) -> str | None:
    """Return the first difference in words."""
    for a, b in zip_longest(ours, theirs):
        if a is None or b is None or not a.near(b):
            name = (b or a).name
            return f"something else enters {name}" if name else "training_step returns something else"
    return None
