"""Which parameters of a module are weights to make sparse, and why the others are not."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_sparse.layers.sparse import SparseConv2d, SparseLayer, SparseLinear

__all__ = ["FROZEN", "Choice", "choose", "table"]

# Made sparse by default, with the prefixes of the names of their weights. MultiheadAttention's out_proj is a Linear.
_BY_DEFAULT: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    nn.Bilinear: ("weight",),
    nn.Conv1d: ("weight",),
    nn.Conv2d: ("weight",),
    nn.Conv3d: ("weight",),
    nn.RNNBase: ("weight_",),
    SparseLinear: ("weight",),
    SparseConv2d: ("weight",),
    nn.RNNCellBase: ("weight_",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


#: reason of a parameter that does not train
FROZEN = "frozen"


@dataclass
class Choice:
    """One parameter of the module, and what is done with it.

    Attributes:
        name: the parameter's name in the LightningModule.
        kind: the type of the module that holds it.
        parameter: the parameter itself.
        reason: why it is left dense; None if it is made sparse.
        tied: its other names, if it stands in several places.
        transposed_groups: the number of groups of a transposed convolution, whose outputs lie along the second
            dimension; 0 for every other layer.
        sparse: the layer, if it holds only the nonzeros of the weight: ``parameter`` is the vector of their values.
    """

    name: str
    kind: str
    parameter: nn.Parameter
    reason: str | None
    tied: tuple[str, ...] = ()
    transposed_groups: int = 0
    sparse: SparseLayer | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.parameter.shape) if self.sparse is None else self.sparse.shape

    @property
    def layer(self) -> str:
        """The layer in words."""
        return f"{self.kind}, tied to {', '.join(self.tied)}" if self.tied else self.kind


def _places(module: nn.Module) -> Iterator[tuple[nn.Parameter, list[tuple[str, str, nn.Module]]]]:
    """Yield each parameter once, with all places ``(full name, local name, owner)`` where it stands."""
    found: dict[nn.Parameter, list[tuple[str, str, nn.Module]]] = {}
    for prefix, owner in module.named_modules():
        for local, parameter in owner.named_parameters(recurse=False):
            if isinstance(owner, SparseLayer) and local == "values":
                local = "weight"  # of the dense layer it stands for
            found.setdefault(parameter, []).append((f"{prefix}.{local}" if prefix else local, local, owner))
    yield from found.items()


def _by_default(local: str, owner: nn.Module) -> bool:
    gain = local.endswith("_g")  # of weight_norm
    return not gain and any(isinstance(owner, kind) and local.startswith(names) for kind, names in _BY_DEFAULT.items())


def _matches(pattern: str, names: Sequence[str]) -> bool:
    """Match a glob on any of the names; ``*.head.weight`` also finds a ``head.weight`` at the top."""
    plain = [name.replace("_orig_mod.", "") for name in names]
    return any(fnmatchcase(form, pattern) for name in (*names, *plain) for form in (name, f".{name}"))


def choose(module: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] = ()) -> list[Choice]:
    """Say of every parameter of ``module`` whether it is made sparse.

    By default these are the weights of linear, convolution, recurrent and attention layers. With ``include`` they are
    the weights whose name matches one of its glob patterns, whatever the layer (so also those of embeddings and
    transposed convolutions); ``exclude`` takes names away from either. Biases, norms and frozen parameters never count.
    A weight that stands in several places (tied) appears once, under its first name.

    Raises:
        ValueError: a pattern matches no weight, a lazy layer has no shape yet, or an embedding has sparse gradients.
    """
    choices = []
    unused = {*(include or ()), *exclude}
    for parameter, places in _places(module):
        name, first, owner = places[0]
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"{name} ({type(owner).__name__}) must have a shape when the fit starts, but is not initialized. Run "
                "an example through the module before, e.g. in __init__ or configure_model."
            )
        sparse = owner if isinstance(owner, SparseLayer) and first == "weight" else None
        shape = tuple(parameter.shape) if sparse is None else sparse.shape
        names = [place[0] for place in places]
        reason = None
        matched = {pattern for pattern in (*(include or ()), *exclude) if _matches(pattern, names)}
        if len(shape) < 2 or any(local.startswith("bias") or isinstance(o, _NORMS) for _, local, o in places):
            reason = "bias, norm or scalar"
        else:
            unused -= matched
            if matched & set(exclude):
                reason = "excluded"
            elif include is not None and not matched & set(include):
                reason = "not included"
            elif include is None and not all(_by_default(local, holder) for _, local, holder in places):
                others = [type(holder).__name__ for _, local, holder in places if not _by_default(local, holder)]
                reason = f"{others[0]}: only on request (include)"
            elif not parameter.requires_grad:
                reason = FROZEN
            elif not parameter.is_floating_point() or math.prod(shape) == 0:
                reason = "not a real-valued tensor with elements"
        transposed = [holder for _, _, holder in places if isinstance(holder, _TRANSPOSED)]
        groups = int(transposed[0].groups) if transposed else 0
        if reason is None and any(isinstance(o, _EMBEDDINGS) and o.sparse for _, _, o in places):
            raise ValueError(
                f"{name} ({type(owner).__name__}) must have dense gradients to be made sparse, but its layer has "
                f"sparse=True. Make the layer with sparse=False, or leave it out with exclude=[{name!r}]."
            )
        choices.append(Choice(name, type(owner).__name__, parameter, reason, tuple(names[1:]), groups, sparse))
    if unused:
        weights = [choice.name for choice in choices if len(choice.shape) >= 2]
        raise ValueError(
            f"include and exclude must match the names of weights, but {sorted(unused)} match none. "
            f"Biases and norms are never made sparse. The weights are: {weights}."
        )
    return choices


def table(title: str, choices: Sequence[Choice]) -> str:
    """Return a readable table of what is sparse, what is not and why."""
    rows = [("weight", "layer", "shape", "training")]
    small: dict[str, list[Choice]] = {}
    for choice in choices:
        if choice.reason is not None and len(choice.shape) < 2:
            small.setdefault(choice.reason, []).append(choice)
            continue
        state = "sparse" if choice.reason is None else f"dense ({choice.reason})"
        shape = " x ".join(map(str, choice.shape))
        rows.append((choice.name, choice.layer, shape, state))
    rows += [(f"{len(group)} small ones", "", "", f"dense ({reason})") for reason, group in small.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    sparse = sum(math.prod(choice.shape) for choice in choices if choice.reason is None)
    total = sum(math.prod(choice.shape) for choice in choices)
    count = sum(choice.reason is None for choice in choices)
    lines.append(f"{count} weights, {sparse:,} of {total:,} parameters ({sparse / max(total, 1):.1%}) train sparse")
    return "\n".join([title, *lines])
