"""Kinds of layers: which of their parameters are weights, and where their outputs lie."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

__all__ = ["LAYERS", "LayerKind", "kind_name", "kind_of", "register_layer"]


class LayerKind(NamedTuple):
    """What is to know of the layers of one type.

    Attributes:
        weights: what the names of their weights begin with.
        by_default: they are made sparse without ``include``.
        out_axis: the dimension of the weight along which the outputs lie; a negative one counts from the last.
        grouped: the layer's ``groups`` divide the first dimension, and each has outputs of its own.
        stacked: of a weight with more than two dimensions, the first counts matrices, such as experts.
        unless: attributes of a layer that, if there are any, say that it makes its weight of several parameters first;
            then it is made sparse only on request.
    """

    weights: tuple[str, ...] = ("weight",)
    by_default: bool = True
    out_axis: int = 0
    grouped: bool = False
    stacked: bool = False
    unless: tuple[str, ...] = ()


_ON_REQUEST = LayerKind(by_default=False)
_TRANSPOSED = LayerKind(by_default=False, out_axis=1, grouped=True)

#: layers with weights, by type, or by its full name where the package is not imported; those of other types are made
#: sparse only on request. A subclass is as its nearest base. MultiheadAttention's out_proj and
#: sparse linear layers are Linear
LAYERS: dict[type[nn.Module] | str, LayerKind] = {
    nn.Linear: LayerKind(),
    nn.Bilinear: LayerKind(),
    nn.Conv1d: LayerKind(),
    nn.Conv2d: LayerKind(),
    nn.Conv3d: LayerKind(),
    nn.RNNBase: LayerKind(("weight_",)),
    nn.RNNCellBase: LayerKind(("weight_",)),
    nn.MultiheadAttention: LayerKind(("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")),
    nn.Embedding: _ON_REQUEST,
    nn.EmbeddingBag: _ON_REQUEST,
    nn.ConvTranspose1d: _TRANSPOSED,
    nn.ConvTranspose2d: _TRANSPOSED,
    nn.ConvTranspose3d: _TRANSPOSED,
    "transformers.pytorch_utils.Conv1D": LayerKind(out_axis=1),
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts": LayerKind(
        ("gate_up_proj", "down_proj"), out_axis=-1, stacked=True
    ),
    "torch_geometric.nn.dense.linear.Linear": LayerKind(),
    "torch_geometric.nn.dense.linear.HeteroLinear": LayerKind(out_axis=-1, stacked=True),
    "torch_geometric.nn.conv.rgcn_conv.RGCNConv": LayerKind(
        ("weight", "root"), out_axis=-1, stacked=True, unless=("num_bases", "num_blocks")
    ),
}

#: packages whose classes are named without them
_OWN = ("torch", "lightning_sparse")


def register_layer(
    layer: type[nn.Module], *, weights: Sequence[str] = ("weight",), out_axis: int = 0, stacked: bool = False
) -> None:
    """Make the weights of a layer type known: they are made sparse by default, and their outputs lie where you say.

    Thresholds, fan-in and empty neurons go by the outputs: a neuron is all that one output reads. Subclasses are as
    their nearest base that is known. Call it where the class is defined, so that every process does.

    Args:
        layer: the type of the module that holds the parameters, a linear map or convolution of what it reads.
        weights: what the names of its weights begin with; biases never count.
        out_axis: the dimension along which the outputs lie, such as 1 for a weight ``(in, out)``; a negative one
            counts from the last.
        stacked: the first dimension of a weight with more than two counts matrices, such as experts
            ``(experts, out, in)``, whose ``out_axis`` is 1. Each has neurons of its own; together they are one weight.

    Raises:
        ValueError: an argument is not as it should be.

    Example:
        >>> import torch
        >>> from lightning_sparse import register_layer
        >>> class InOut(torch.nn.Module):
        ...     def __init__(self, inputs, outputs):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.randn(inputs, outputs))
        ...
        ...     def forward(self, x):
        ...         return x @ self.weight
        >>> register_layer(InOut, out_axis=1)
    """
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise ValueError(f"layer must be a subclass of torch.nn.Module, got {layer!r}. Give the class, not a layer.")
    if isinstance(weights, str) or not weights or not all(isinstance(name, str) and name for name in weights):
        raise ValueError(f'weights must be a list of names such as ["weight"], got {weights!r}.')
    if not isinstance(out_axis, int) or isinstance(out_axis, bool):
        raise ValueError(f"out_axis must be an integer, got {out_axis!r}. Give 1 for a weight (in, out).")
    if not isinstance(stacked, bool):
        raise ValueError(f"stacked must be True or False, got {stacked!r}. True is for weights (experts, out, in).")
    if stacked and out_axis == 0:
        raise ValueError(
            "out_axis must not be 0 with stacked=True, got 0: the first dimension counts the matrices. Give 1 for a "
            "weight (experts, out, in), or 2 for (experts, in, out)."
        )
    LAYERS[layer] = LayerKind(tuple(weights), out_axis=out_axis, stacked=stacked)


def kind_of(layer: nn.Module) -> LayerKind | None:
    """Return what is known of a layer; None: nothing."""
    found = (LAYERS.get(type_) or LAYERS.get(_full_name(type_)) for type_ in type(layer).__mro__)
    return next((kind for kind in found if kind), None) or _of_experts(layer)


def kind_name(layer: nn.Module) -> str:
    """Return the name of a layer's type, with its package if that is neither torch nor this one."""
    kind = type(layer)
    return kind.__name__ if kind.__module__.partition(".")[0] in _OWN else _full_name(kind)


def _of_experts(layer: nn.Module) -> LayerKind | None:
    """Return what is known of the experts of transformers 5, which say how their weights lie; of others None."""
    marks = vars(layer)
    transposed = marks.get("is_transposed")
    if not (isinstance(transposed, bool) and isinstance(marks.get("has_bias"), bool)):
        return None
    return LayerKind(("gate_up_proj", "up_proj", "down_proj"), out_axis=-1 if transposed else -2, stacked=True)


def _full_name(type_: type) -> str:
    return f"{type_.__module__}.{type_.__qualname__}"
