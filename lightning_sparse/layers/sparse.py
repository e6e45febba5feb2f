"""SparseLinear and SparseConv2d: layers whose weight is the vector of its nonzeros.

They take the place of ``nn.Linear`` and ``nn.Conv2d``, and are subclasses of these: code that asks ``isinstance``, for
attributes, or for the dtype, device or shape of ``layer.weight`` is answered as by a dense layer. ``make_sparse_`` and
``make_dense_`` turn one into the other in place, so that hooks, names and other references to the layer stay what they
are.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Generator, Tensor, nn

from lightning_sparse.compat import checks, torch_private
from lightning_sparse.kernels.products import DENSE
from lightning_sparse.kernels.structure import (
    CSR,
    Structure,
    check_csr,
    check_positions,
    csr,
    flat_positions,
    moved,
    structure,
)
from lightning_sparse.layers.densely import conv2d_densely, linear_densely
from lightning_sparse.layers.functional import conv2d, linear, padded, product_dtype
from lightning_sparse.layers.stand_in import StandIn
from lightning_sparse.rules import sampling, select

__all__ = [
    "SparseConv2d",
    "SparseLayer",
    "SparseLinear",
    "check_drawn",
    "dense_weight",
    "make_dense_",
    "make_sparse_",
    "sparse_layers",
    "to_dense",
]

_SAVED = ("values", "crow", "col", "weight_shape")
_CSR = ("crow", "col", "values")

Self = TypeVar("Self", bound="SparseLayer")
Layer = TypeVar("Layer", bound="nn.Linear | nn.Conv2d | SparseLayer")


class SparseLayer(nn.Module):
    """What the sparse layers have in common.

    Among the parameters the nonzeros have the name of the dense weight, ``weight``; in a ``state_dict`` they are
    ``values``.

    Attributes:
        crow: where each row of the weight begins among them, ``(out + 1,)``, int32.
        col: the columns, ``(nnz,)``, int32, counted over all groups.
        weight_shape: of the dense weight, int64; not read, but what a checkpoint needs to be made dense.
        plain: ``state_dict`` has the dense ``weight`` in the place of these.
        backend: who multiplies, see ``kernels.dispatch``; ``"dense"``: a dense weight, made for each pass; None: the
            sparse one that is quicker as a rule.
        full_name: of the weight in the module that is trained; None: not known.
        products: the kind of kernels that compute it, a key of ``kernels.dispatch.BACKENDS``.
        indices: names of the tensors of its structure.
        block: size of what the structure has for nonzeros.
    """

    products: ClassVar[str] = "products"
    indices: ClassVar[tuple[str, ...]] = ("crow", "col", "transposed_crow", "transposed_col", "permutation")
    block: tuple[int, int] = (1, 1)

    bias: nn.Parameter | None
    crow: Tensor
    col: Tensor
    transposed_crow: Tensor
    transposed_col: Tensor
    permutation: Tensor
    plain: bool = False
    backend: str | None = None
    full_name: str | None = None
    _found: tuple[Tensor, Tensor] | None = None

    @property
    def values(self) -> nn.Parameter:
        """The nonzeros in the order of their positions, ``(nnz,)``: the parameter."""
        values = torch_private.parameters(self)["weight"]
        assert values is not None
        return values

    @property
    def weight(self) -> Tensor:
        """Stands in for the dense weight: it has its shape, dtype and device, but no elements.

        Raises:
            RuntimeError: elements are read or written.
        """
        name = self.full_name or f"weight of {type(self).__name__}({self.extra_repr()})"
        return StandIn.of(self.values, self.shape, name)

    @weight.setter
    def weight(self, weight: Any) -> None:
        self._refuse_exchange(weight)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        raise NotImplementedError

    @property
    def nnz(self) -> int:
        """Number of nonzeros."""
        return len(self.values)

    @property
    def positions(self) -> Tensor:
        """Flat positions of the nonzeros in the dense weight, ascending; int64."""
        return flat_positions(self.crow, self.col, self.shape)

    @property
    def structure(self) -> Structure:
        """Where the nonzeros are, as products need it."""
        return Structure.of([getattr(self, name) for name in self.indices], self.backend, self.block)

    @property
    def matrix(self) -> CSR:
        """The weight as a matrix of its nonzeros one by one."""
        return self.structure.matrix

    def set_connections(self, positions: Tensor, values: Tensor) -> None:
        """Exchange the nonzeros; ``values`` stays the same parameter object, though of another length.

        Args:
            positions: flat ones in the dense weight, ascending and different.
            values: theirs.

        Raises:
            ValueError: the positions are others, or there is another number of values.
        """
        check_positions(positions, self.shape)
        if not isinstance(values, Tensor) or values.shape != positions.shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"values must have one element for each of {len(positions)} positions, got {got}. "
                "Give weight.flatten()[positions]."
            )
        self.set_structure(self.structure_at(positions), values)

    def structure_at(self, positions: Tensor) -> Structure:
        """Return what the structure would be with nonzeros at these flat positions, ascending and different."""
        return structure(positions, self.shape, getattr(self, "groups", 1))

    def structure_moved(self, dropped: Tensor, grown: Tensor) -> tuple[Structure, Tensor]:
        """Return what the structure would be when connections move, and where each of its nonzeros comes from.

        Args:
            dropped: flat positions of nonzeros, ascending.
            grown: flat positions, ascending, of others, or of some that are dropped.

        Returns:
            The structure, and of each nonzero its index among those held and grown, one after the other, int32.
        """
        going, coming = (csr(x, self.shape, getattr(self, "groups", 1)) for x in (dropped, grown))
        return moved(self.matrix, going, coming)

    def set_structure(self, found: Structure, values: Tensor) -> None:
        """Exchange the nonzeros for those of ``structure_at``, see ``set_connections``."""
        self._set_structure(found)
        if len(values) == self.nnz:
            self.values.data.copy_(values)  # the storage may be known elsewhere, as to DDP
        else:
            self._set_values(values.to(self.values))

    def dense_weight(self) -> Tensor:
        """Return the dense weight, without gradient."""
        return dense_weight(self.values.detach(), self.crow, self.col, self.shape)

    @classmethod
    def from_dense(cls: type[Self], layer: nn.Linear | nn.Conv2d, positions: Tensor | None = None) -> Self:
        """Return a sparse copy of a dense layer.

        Args:
            layer: stays as it is.
            positions: flat ones of the connections to keep, ascending; default: where the weight is not 0.
        """
        if _SPARSE.get(type(layer)) is not cls:
            raise TypeError(
                f"layer must be an nn.{_DENSE[cls].__name__} for {cls.__name__}, got {type(layer).__name__}."
            )
        if positions is None:
            positions = select.positions(layer.weight.detach() != 0)
        sparse = make_sparse_(_copy(layer), positions)
        assert isinstance(sparse, cls)
        return sparse

    def to_dense(self) -> nn.Linear | nn.Conv2d:
        """Return a dense copy."""
        return make_dense_(_copy(self))

    def extra_repr(self) -> str:
        """Show what a dense layer shows, and the density."""
        return f"{super().extra_repr()}, nnz={self.nnz} ({self.nnz / max(math.prod(self.shape), 1):.3g})"

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse another weight in the place of the nonzeros.

        Raises:
            RuntimeError: it is not a vector of as many values.
        """
        if name == "weight" and (param is None or param.shape != self.values.shape):
            self._refuse_exchange(param)
        super().register_parameter(name, param)

    def _refuse_exchange(self, weight: Any) -> None:
        raise RuntimeError(
            f"{self.full_name or 'weight'} cannot be exchanged for {'None' if weight is None else 'another one'}: "
            "its layer is sparse and holds the nonzeros alone. Exchange it before the fit, keep it dense with "
            f"exclude=[{self.full_name or '...'!r}], or train with storage='masked'."
        )

    def register_structure(self, found: Structure) -> None:
        """Hold the structure in buffers; what a state has of it is written and read below."""
        for name in self.indices:
            self.register_buffer(name, None, persistent=False)
        self._set_structure(found)

    def _set_structure(self, found: Structure) -> None:
        for name, tensor in zip(self.indices, found.tensors, strict=True):
            setattr(self, name, _trainable(tensor))

    def _set_values(self, values: Tensor) -> None:
        """Exchange the parameter's data for that of another length."""
        self.values.grad = None
        # a graph that is still alive holds what accumulates the gradient, with the old length; another dtype resets it
        other = torch.float32 if values.dtype == torch.float64 else torch.float64
        self.values.data = _trainable(self.values.data.new_empty(0, dtype=other))
        self.values.data = _trainable(values)

    def _take(self, x: Tensor) -> tuple[Tensor, torch.dtype]:
        """Return the input and the dtype of the output, which autocast may change."""
        if x.dtype != self.values.dtype and not torch.is_autocast_enabled(x.device.type):
            raise RuntimeError(f"Input and weight of {self!r} must have the same dtype: {x.dtype}, {self.values.dtype}")
        return x, product_dtype(x.device.type, self.values.dtype)

    def _nonzeros(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, tuple[int, ...]]:
        """Return what dense products need: values and bias in this dtype, positions and shape.

        Positions are kept for as long as the permutation is, which is exchanged as a whole.
        """
        if self._found is None or self._found[0] is not self.permutation:
            self._found = self.permutation, self.positions
        bias = None if self.bias is None else self.bias.to(dtype)
        return self.values.to(dtype), bias, self._found[1], self.shape

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Write the dense weight if ``plain``, else ``values`` and where they are."""
        entries: dict[str, Any] = {}
        super()._save_to_state_dict(entries, prefix, keep_vars)
        values = entries.pop(f"{prefix}weight")
        if self.plain:
            del entries[f"{prefix}weight_shape"]
            weight = {f"{prefix}weight": self.dense_weight()}
        else:
            weight = {f"{prefix}values": values, f"{prefix}crow": self.crow, f"{prefix}col": self.col}
        destination.update(weight | entries)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take up another number of nonzeros, too, and a dense weight that is 0 where there is no connection.

        What is not a weight of this shape is an error of ``load_state_dict``, and leaves the layer as it is.
        """
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, Tensor) and f"{prefix}values" not in state_dict:
            values = weight.reshape(-1)[self.positions.to(weight.device)] if weight.shape == self.shape else None
            if values is None or values.count_nonzero() != weight.count_nonzero():
                error_msgs.append(
                    f"{prefix}weight is dense, the layer sparse: load it before the layer is made sparse, "
                    "and fit without ckpt_path."
                )
                return
            entries = values, self.crow, self.col, self.weight_shape
            state_dict = {key: x for key, x in state_dict.items() if key != f"{prefix}weight"}
            state_dict.update({prefix + name: entry for name, entry in zip(_SAVED, entries, strict=True)})
        given = {name: state_dict[prefix + name] for name in _CSR if prefix + name in state_dict}
        shape = state_dict.get(prefix + "weight_shape", self.weight_shape)
        try:
            held = shape.tolist() if isinstance(shape, Tensor) and not shape.is_meta else shape
            if held != list(self.shape):
                raise ValueError(f"{prefix}values belong to a weight of shape {held}, not {list(self.shape)}.")
            vectors = {prefix + name: given.get(name, getattr(self, name).detach()) for name in _CSR}
            check_csr(vectors, self.shape, getattr(self, "groups", 1))
            crow, col, _ = (x.to(self.values.device) for x in vectors.values())
            found = self.structure_at(flat_positions(crow, col, self.shape))
        except ValueError as error:
            error_msgs.append(str(error))
            return
        missing_keys += [prefix + name for name in _CSR[:2] if name not in given]
        state_dict = {key: x for key, x in state_dict.items() if key.removeprefix(prefix) not in _CSR}
        if "values" in given:
            if len(given["values"]) != self.nnz:
                self._set_values(self.values.data.new_empty(len(given["values"])))
            state_dict[f"{prefix}weight"] = given["values"]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._set_structure(found)


class SparseLinear(SparseLayer, nn.Linear):  # type: ignore[misc, override]  # weight is no attribute
    """``nn.Linear`` with a sparse weight: memory and time in proportion to its nonzeros.

    Positions are drawn uniformly, exactly ``nnz`` of them, and values uniformly within one over the square root of the
    number of nonzeros in their row, which is how ``nn.Linear`` draws for a dense row.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        nnz: number of nonzeros.
        bias: add a bias.
        generator: for all draws, on the CPU; default: torch's.
        dtype: of values and bias.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> layer = SparseLinear(512, 256, nnz=1000)
        >>> layer(torch.ones(8, 512)).shape, layer.values.shape
        (torch.Size([8, 256]), torch.Size([1000]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nnz: int,
        bias: bool = True,
        generator: Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        checks.integer(1, "It is the size of the input's last dimension.", in_features=in_features)
        checks.integer(1, "It is the size of the output's last dimension.", out_features=out_features)
        checks.integer(0, "It is the number of nonzeros.", nnz=nnz)
        check_drawn(bias, generator, dtype)
        _draw_into(self, nn.Linear(in_features, out_features, bias, device="meta", dtype=dtype), nnz, generator)

    @property
    def shape(self) -> tuple[int, int]:  # noqa: D102  (inherited)
        return self.out_features, self.in_features

    def _multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the output, in any dtype; ``dtype`` is the one that is asked for."""
        return linear(x, self.values, self.bias, self.structure)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (as nn.Linear names it)
        """Return ``x W.T + bias`` for ``x`` ``(..., in_features)``."""
        x, dtype = self._take(input)
        with torch.autocast(x.device.type, enabled=False):
            if self.backend == DENSE:
                return linear_densely(x.to(dtype), *self._nonzeros(dtype))
            return self._multiply(x, dtype).to(dtype)


class SparseConv2d(SparseLayer, nn.Conv2d):  # type: ignore[misc, override]  # weight is no attribute
    """``nn.Conv2d`` with a sparse weight: parameters, gradients and optimizer state in proportion to its nonzeros.

    Some images at a time are packed or unfolded, so what this takes does not grow with the batch.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: as in ``nn.Conv2d``.
        nnz: number of nonzeros.
        stride: as in ``nn.Conv2d``.
        padding: as in ``nn.Conv2d``.
        dilation: as in ``nn.Conv2d``.
        groups: as in ``nn.Conv2d``.
        bias: add a bias.
        padding_mode: as in ``nn.Conv2d``.
        generator: for all draws, on the CPU; default: torch's.
        dtype: of values and bias.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> layer = SparseConv2d(16, 32, 3, nnz=500, padding=1)
        >>> layer(torch.ones(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        nnz: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        generator: Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        checks.integer(1, "It is the number of channels of the input.", in_channels=in_channels)
        checks.integer(1, "It is the number of channels of the output.", out_channels=out_channels)
        checks.integer(1, "1 lets each output read all channels.", groups=groups)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must divide in_channels={in_channels} and out_channels={out_channels}, got {groups}. Give 1."
            )
        checks.pair(1, "3 is usual.", kernel_size=kernel_size)
        checks.pair(1, "1 reads at every place.", stride=stride)
        checks.pair(1, "1 reads neighbours.", dilation=dilation)
        if padding not in ("valid", "same"):
            checks.pair(0, "Also 'same' and 'valid' are known.", padding=padding)  # type: ignore[arg-type]
        checks.one_of(("zeros", "reflect", "replicate", "circular"), padding_mode=padding_mode)
        checks.integer(0, "It is the number of nonzeros.", nnz=nnz)
        check_drawn(bias, generator, dtype)
        dense = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device="meta",
            dtype=dtype,
        )
        _draw_into(self, dense, nnz, generator)

    @property
    def shape(self) -> tuple[int, int, int, int]:  # noqa: D102  (inherited)
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (as nn.Conv2d names it)
        """Return the convolution of ``(batch, in_channels, height, width)``, or of one image."""
        x, dtype = self._take(input)
        images = x if x.ndim == 4 else x.unsqueeze(0)
        with torch.autocast(x.device.type, enabled=False):
            images, geometry = padded(self, images)
            if self.backend == DENSE:
                y = conv2d_densely(images.to(dtype), *self._nonzeros(dtype), geometry, self.groups)
            else:
                y = conv2d(images, self.values, self.bias, self.structure, geometry).to(dtype)
        return y if x.ndim == 4 else y.squeeze(0)


_SPARSE: dict[type[nn.Module], type[SparseLayer]] = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}
_DENSE: dict[type[nn.Module], type[nn.Module]] = {sparse: dense for dense, sparse in _SPARSE.items()}


@torch.no_grad()
def make_sparse_(layer: nn.Linear | nn.Conv2d, positions: Tensor, generator: Generator | None = None) -> SparseLayer:
    """Turn a dense layer into a sparse one, in place, and free its dense weight.

    A layer on the meta device has no values yet: they are drawn on the CPU, for the number of nonzeros of each row.

    Args:
        layer: exactly of type ``nn.Linear`` or ``nn.Conv2d``.
        positions: flat ones of the connections to keep, ascending and different.
        generator: for values of layers on the meta device; on the CPU.

    Raises:
        TypeError: the layer is of another type.
        ValueError: the positions are not in the weight, ascending and different; the weight is complex.
    """
    if type(layer) not in _SPARSE:
        raise TypeError(f"Only nn.Linear and nn.Conv2d have a sparse form, not {type(layer).__name__}.")
    weight = layer.weight
    if not weight.is_floating_point():
        raise ValueError(f"layer must have a floating-point weight, got one of {weight.dtype}. Leave it dense.")
    bias = torch_private.parameters(layer)["bias"]
    shape = tuple(weight.shape)
    check_positions(positions, shape)
    found = structure(positions.to("cpu" if weight.is_meta else weight.device), shape, getattr(layer, "groups", 1))
    if weight.is_meta:
        fan_in = found.matrix.crow.diff()
        values = _uniform(len(positions), weight.dtype, generator)
        values.mul_(fan_in.double().rsqrt().to(values.dtype).repeat_interleave(fan_in, output_size=len(positions)))
        if bias is not None and bias.is_meta:
            bias = nn.Parameter(_uniform(len(bias), bias.dtype, generator) / math.prod(shape[1:]) ** 0.5)
    else:
        values = weight.reshape(-1)[positions.to(weight.device)]
    values = nn.Parameter(values.to(weight.dtype), weight.requires_grad)
    torch_private.set_parameters(layer, {"weight": values, "bias": bias})
    layer.__class__ = _SPARSE[type(layer)]  # type: ignore[assignment]
    assert isinstance(layer, SparseLayer)
    layer.register_buffer("weight_shape", torch.tensor(shape, device=values.device))
    layer.register_structure(found)
    return layer


@torch.no_grad()
def make_dense_(layer: SparseLayer) -> nn.Linear | nn.Conv2d:
    """Turn a sparse layer into the dense one, in place."""
    if not isinstance(layer, SparseLayer):
        raise TypeError(f"layer must be a SparseLinear or SparseConv2d, got one of type {type(layer).__name__}.")
    weight = nn.Parameter(layer.dense_weight(), layer.values.requires_grad)
    for name in ("weight_shape", *layer.indices):
        delattr(layer, name)
    for name in ("plain", "backend", "full_name", "_found", "block"):
        vars(layer).pop(name, None)
    torch_private.set_parameters(layer, {"weight": weight, "bias": layer.bias})
    layer.__class__ = next(_DENSE[kind] for kind in type(layer).mro() if kind in _DENSE)  # type: ignore[assignment]
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    return layer


def sparse_layers(module: nn.Module) -> dict[str, SparseLayer]:
    """Return the sparse layers in ``module`` by their names."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, SparseLayer)}


def to_dense(module: nn.Module) -> nn.Module:
    """Turn all sparse layers in ``module`` into dense ones, in place, and return it."""
    checks.module(module=module)
    for layer in sparse_layers(module).values():
        make_dense_(layer)
    return module


def dense_weight(values: Tensor, crow: Tensor, col: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the dense weight of a layer with these nonzeros."""
    weight = values.new_zeros(math.prod(shape))
    weight[flat_positions(crow, col, shape)] = values
    return weight.view(shape)


def _trainable(x: Tensor) -> Tensor:
    """Return ``x`` as training needs it, though a state may be loaded while validating, in inference mode."""
    with torch.inference_mode(False):
        return x.clone() if x.is_inference() else x


def _copy(layer: Layer) -> Layer:
    """Return a copy that shares the weight, which is about to be exchanged, but not the bias."""
    twin = copy.copy(layer)
    twin.__dict__ = {
        key: copy.copy(value) if isinstance(value, (dict, set)) else value for key, value in layer.__dict__.items()
    }
    if layer.bias is not None:
        twin.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    return twin


def check_drawn(bias: object, generator: object, dtype: object) -> None:
    """Raise unless a sparse layer can be drawn with these arguments."""
    checks.flag(bias=bias)  # type: ignore[arg-type]
    if generator is not None and not (isinstance(generator, Generator) and generator.device.type == "cpu"):
        raise ValueError(f"generator must be a torch.Generator on the CPU, or None, got {generator!r}.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point dtype, or None, got {dtype!r}. torch.float32 is usual.")


def _draw_into(sparse: SparseLayer, dense: nn.Linear | nn.Conv2d, nnz: int, generator: Generator | None) -> None:
    """Make ``sparse``, an empty module, what ``dense``, a layer on the meta device, would be with ``nnz`` nonzeros."""
    size = dense.weight.numel()
    if not 0 <= nnz <= size:
        raise ValueError(f"nnz must be from 0 to {size}, the size of the dense weight, got {nnz!r}.")
    generator = torch.default_generator if generator is None else generator
    positions = sampling.distinct(nnz, size, generator)
    sparse.__dict__ = make_sparse_(dense, positions, generator).__dict__


def _uniform(n: int, dtype: torch.dtype, generator: Generator | None) -> Tensor:
    """Draw from -1 to 1; in the dtype's precision, float32 at least."""
    return torch.rand(n, dtype=torch.promote_types(dtype, torch.float32), generator=generator).mul_(2).sub_(1)
