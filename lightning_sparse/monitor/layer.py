"""One of the weights that a monitor looks at, and what a look at its mask tells."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.accounting import masks
from lightning_sparse.layers.selection import select_parameters
from lightning_sparse.rules.matrices import as_matrix
from lightning_sparse.trainer.callback import SparseCallback

__all__ = ["COUNTS", "Layer", "layers_of", "picture"]

#: what is counted of each layer's mask, and of the whole
COUNTS = ("empty_neurons", "empty_inputs", "shrunk_size")

_THOUSANDTHS = [json.dumps(thousandths / 1000) for thousandths in range(1001)]


@dataclass
class Layer:
    """One of the selected weights.

    Attributes:
        name: of the parameter in the LightningModule.
        shape: of the weight, dense.
        groups: of a convolution.
        transposed_groups: see ``layers.selection.ParameterChoice``.
        method: that makes it sparse; None in a dense run.
    """

    name: str
    shape: tuple[int, ...]
    groups: int
    transposed_groups: int
    method: SparseCallback | None

    @property
    def size(self) -> int:
        """Number of weights, dense."""
        return math.prod(self.shape)

    @property
    def neurons(self) -> int:
        """Number of outputs: features or channels."""
        return self.shape[1] * self.transposed_groups if self.transposed_groups else self.shape[0]

    @property
    def inputs(self) -> int:
        """Number of inputs: features or channels."""
        return self.shape[0] if self.transposed_groups else self.shape[1] * self.groups

    def mask(self) -> Tensor:
        """Return where the weight is active now."""
        return torch.ones(self.shape, dtype=torch.bool) if self.method is None else self.method.mask(self.name)


def layers_of(module: nn.Module, methods: Sequence[SparseCallback]) -> list[Layer]:
    """List the selected weights: those that the methods have, in a dense run those that they would choose."""
    choices = {choice.name: choice for choice in select_parameters(module)}
    owners: dict[str, SparseCallback | None] = {}
    for method in methods:
        owners |= dict.fromkeys(method.layer_density, method)
    if not methods:
        owners = dict.fromkeys(name for name, choice in choices.items() if choice.reason is None)
    return [
        Layer(
            name,
            choice.shape,
            int(getattr(module.get_submodule(name.rpartition(".")[0]), "groups", 1)),
            choice.transposed_groups,
            owners[name],
        )
        for name, choice in choices.items()
        if name in owners
    ]


def picture(layer: Layer, mask: Tensor) -> dict[str, Any]:
    """Return what a look at a mask as a matrix tells: empty neurons and inputs, and its picture."""
    matrix = as_matrix(mask, layer.transposed_groups)
    # the rows of a transposed convolution's weight are its inputs
    empty_inputs = masks.empty_neurons(mask) if layer.transposed_groups else masks.empty_inputs(mask, layer.groups)
    cells, (rows, columns) = masks.cells(matrix), matrix.shape
    # many numbers of few values: looking their texts up is ten times as fast as json.dumps
    texts = [", ".join(map(_THOUSANDTHS.__getitem__, row)) for row in (1000 * cells).round().int().tolist()]
    return {
        "empty_neurons": masks.empty_neurons(matrix),
        "empty_inputs": empty_inputs,
        "shrunk_size": masks.shrunk_size(mask, layer.transposed_groups or layer.groups),
        "rows": rows,
        "columns": columns,
        "cells": cells,
        "json": f'{{"rows": {rows}, "columns": {columns}, "density": [[{"], [".join(texts)}]]}}',
    }
