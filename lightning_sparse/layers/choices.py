"""ParameterChoice: one parameter of a module, and what is done with it; all of them in words."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lightning_sparse.compat.compiled import plain_name
from lightning_sparse.layers.sparse import SparseLayer
from lightning_sparse.rules.matrices import FIRST, Outputs

__all__ = ["ParameterChoice", "matches", "patterns", "table"]


@dataclass
class ParameterChoice:
    """One parameter of the module, and what is done with it.

    Attributes:
        name: the parameter's name in the LightningModule.
        kind: the type of the module that holds it, with its package if that is not torch.
        parameter: the parameter itself.
        reason: why it is left dense; None if it is made sparse.
        tied: its other names, if it stands in several places.
        outputs: where the layer's outputs lie.
        nonempty: where rows lie of which each must keep a connection, since it is divided by its norm; None: any may
            be empty.
        sparse: the layer, if it holds only the nonzeros of the weight: ``parameter`` is the vector of their values.
        is_weight: it is neither bias, norm, gain nor scalar.
        on_request: it is left dense, but ``include`` may name it.
    """

    name: str
    kind: str
    parameter: nn.Parameter
    reason: str | None
    tied: tuple[str, ...] = ()
    outputs: Outputs = FIRST
    nonempty: Outputs | None = None
    sparse: SparseLayer | None = None
    is_weight: bool = True
    on_request: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.parameter.shape) if self.sparse is None else self.sparse.shape

    @property
    def size(self) -> int:
        """Number of elements of the weight."""
        return math.prod(self.shape)

    @property
    def can_be_added(self) -> bool:
        """It is left dense, but ``include`` may name it, and more than a vector."""
        return self.on_request and sum(size > 1 for size in self.shape) > 1

    @property
    def layer(self) -> str:
        """The layer in words."""
        return f"{self.kind}, tied to {', '.join(self.tied)}" if self.tied else self.kind


def matches(pattern: str, names: Sequence[str]) -> bool:
    """Match a glob on any of the names; ``*.head.weight`` also finds a ``head.weight`` at the top."""
    plain = [plain_name(name) for name in names]
    return any(fnmatchcase(form, pattern) for name in (*names, *plain) for form in (name, f".{name}"))


def patterns(choices: Sequence[ParameterChoice]) -> list[str]:
    """Return glob patterns for ``include`` that choose the weights that are sparse, and all that it may add.

    Numbers of layers become ``*`` wherever that matches nothing else.
    """
    wanted = [plain_name(choice.name) for choice in choices if choice.reason is None or choice.can_be_added]
    others = {plain_name(choice.name) for choice in choices if choice.is_weight} - {*wanted}
    found: dict[str, None] = {}
    for name in wanted:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        found[name if any(matches(pattern, [other]) for other in others) else pattern] = None
    return list(found)


def table(
    title: str,
    choices: Sequence[ParameterChoice],
    densities: Mapping[str, float] | None = None,
    whole: bool = True,
) -> str:
    """Return a readable table of what is sparse, what is not and why.

    Args:
        title: its first line.
        choices: all parameters.
        densities: those that are planned, by parameter name; None or empty: they are found in training.
        whole: the parameters are all that the module has: say how sparse it is as a whole.
    """
    rows = [("weight", "layer", "shape", "density", "training"), *_rows(choices, densities or {})]
    if not densities:
        rows = [row[:3] + row[4:] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    planned = [_planned(choices, densities)] if densities and whole else []
    return "\n".join([title, *lines, _summary(choices), *planned])


def _rows(choices: Sequence[ParameterChoice], densities: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each parameter; those of one dimension stand together, by the reason why they are dense."""
    small: Counter[str] = Counter()
    for choice in choices:
        if choice.reason is not None and len(choice.shape) < 2:
            small[choice.reason] += 1
            continue
        state = "sparse" if choice.reason is None else f"dense ({choice.reason})"
        density = f"{densities[choice.name]:.4g}" if choice.name in densities else ""
        yield choice.name, choice.layer, " x ".join(map(str, choice.shape)), density, state
    for reason, count in small.items():
        yield f"{count} small ones", "", "", "", f"dense ({reason})"


def _summary(choices: Sequence[ParameterChoice]) -> str:
    """Return in words how many parameters train sparse."""
    sizes = [choice.size for choice in choices if choice.reason is None]
    sparse, total = sum(sizes), sum(choice.size for choice in choices)
    return f"{len(sizes)} weights, {sparse:,} of {total:,} parameters ({sparse / max(total, 1):.1%}) train sparse"


def _planned(choices: Sequence[ParameterChoice], densities: Mapping[str, float]) -> str:
    """Return in words how sparse the weights are to be, and the module with them."""
    planned = [choice for choice in choices if choice.name in densities]
    zeros = sum(choice.size * (1 - densities[choice.name]) for choice in planned)
    sizes = sum(choice.size for choice in planned), sum(choice.size for choice in choices)
    of_weights, of_module = (zeros / max(size, 1) for size in sizes)
    return f"sparsity {of_weights:.4g} of these weights, {of_module:.4g} of the whole module"
