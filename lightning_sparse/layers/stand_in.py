"""What stands in for the dense weight of a sparse layer, which does not exist.

Code of any module asks ``layer.weight`` for its dtype, device or shape, and reads or writes its elements. A ``StandIn``
answers the former as the dense weight would, and refuses the latter by the layer's name. ``shaped`` does the same for
code that goes by the dimensions of parameters.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.compat.torch_private import tensor_without_elements, tree_leaves, tree_map

__all__ = ["StandIn", "shaped"]

# what is answered: all that does not depend on the elements
_ANSWERED = {
    *("shape", "ndim", "dtype", "device", "layout", "requires_grad", "itemsize", "nbytes"),
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "is_contiguous", "get_device"),
    *("is_floating_point", "is_complex", "is_signed", "is_conj", "is_neg", "is_inference", "is_nested", "__len__"),
    *("is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_sparse", "is_sparse_csr", "is_quantized", "is_mkldnn"),
}
_TAKES_DTYPE_AND_DEVICE = {"new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "to", "type_as"}


class StandIn(Tensor):
    """A tensor of a dense weight's shape, dtype and device, without elements.

    Whatever needs elements raises a RuntimeError that names the layer and the remedy.
    """

    _is_param = True  # read by isinstance(x, nn.Parameter)

    _nonzeros: Tensor
    _name: str

    @classmethod
    def of(cls, values: Tensor, shape: tuple[int, ...], name: str) -> "StandIn":
        """Return what stands in for the weight of this shape and full name, whose nonzeros are ``values``."""
        result: StandIn = tensor_without_elements(cls, shape, values)
        result._nonzeros, result._name = values, name
        return result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, _name(func)
        given = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, StandIn))
        itself = bool(args) and args[0] is given
        if name in _ANSWERED and func.__name__ != "__set__":
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if name in ("data", "detach") and func.__name__ != "__set__":
            return cls.of(given._nonzeros.detach(), tuple(given.shape), given._name)
        if name in ("requires_grad", "requires_grad_") and itself:
            given._nonzeros.requires_grad_(*args[1:], **kwargs)
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if name in _TAKES_DTYPE_AND_DEVICE and (itself == name.startswith("new_")):
            args, kwargs = tree_map(_nonzeros_of, (args, kwargs))
            return func(*args, **kwargs)
        raise _refusal(given, name)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, StandIn))
        raise _refusal(given, str(func))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StandIn({self._name}, shape={tuple(self.shape)}, nonzeros={len(self._nonzeros)})"


def _name(func: Any) -> str:
    """Return the name of a method, or of the attribute that is read or written."""
    owner = getattr(func, "__self__", None) if func.__name__ in ("__get__", "__set__") else func
    return str(getattr(owner, "__name__", func.__name__))


def _nonzeros_of(x: Any) -> Any:
    return x._nonzeros if isinstance(x, StandIn) else x


def _refusal(given: StandIn, what: str) -> RuntimeError:
    return RuntimeError(
        f"{given._name} has no elements for {what!r}: its layer is sparse and holds the nonzeros alone. Keep it dense "
        f"with exclude=[{given._name!r}], or train with storage='masked'. In code of your own, take layer.values, or "
        "layer.dense_weight()."
    )


# ---------------------------------------------------------------------- parameters


class _Shaped(nn.Parameter):
    """A vector of nonzeros that tells the shape of its dense weight."""

    dense_shape: torch.Size

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.dense_shape

    @property
    def ndim(self) -> int:  # type: ignore[override]
        return len(self.dense_shape)

    def dim(self) -> int:
        return len(self.dense_shape)

    ndimension = dim

    def size(self, dim: int | None = None) -> Any:
        return self.dense_shape if dim is None else self.dense_shape[dim]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Parameter of the nonzeros of a weight of shape {tuple(self.dense_shape)}"


@contextmanager
def shaped(parameters: Iterable[tuple[nn.Parameter, tuple[int, ...]]]) -> Iterator[None]:
    """Let parameters tell the shapes of their dense weights meanwhile; what computes with them sees vectors."""
    changed = list(parameters)
    try:
        for parameter, shape in changed:
            parameter.__class__ = _Shaped
            parameter.dense_shape = torch.Size(shape)  # type: ignore[attr-defined]
        yield
    finally:
        for parameter, _ in changed:
            parameter.__class__ = nn.Parameter
            vars(parameter).pop("dense_shape", None)
