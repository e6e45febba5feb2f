"""One of the weights that a monitor looks at, and what a look at its mask tells."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.accounting import masks
from lightning_sparse.layers.selection import ParameterChoice, select_parameters
from lightning_sparse.rules.matrices import FIRST, Outputs, as_matrix, outputs_first
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
        groups: parts with inputs and outputs of their own: those of a convolution, or the matrices of a stack.
        outputs: where the layer's outputs lie.
        method: that makes it sparse; None in a dense run.
    """

    name: str
    shape: tuple[int, ...]
    groups: int
    outputs: Outputs
    method: SparseCallback | None

    @property
    def size(self) -> int:
        """Number of weights, dense."""
        return math.prod(self.shape)

    @property
    def neurons(self) -> int:
        """Number of outputs: features or channels."""
        return self.outputs.rows(self.shape)

    @property
    def inputs(self) -> int:
        """Number of inputs: features or channels."""
        return self.groups * outputs_first(torch.empty(self.shape, device="meta"), self.outputs).shape[1]

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
            _groups(module, choice),
            choice.outputs,
            owners[name],
        )
        for name, choice in choices.items()
        if name in owners
    ]


def _groups(module: nn.Module, choice: ParameterChoice) -> int:
    """Return the number of parts of a weight with inputs and outputs of their own."""
    if choice.outputs != FIRST:
        return choice.outputs.groups
    layer = module.get_submodule(choice.name.rpartition(".")[0])
    return int(getattr(layer, "groups", 1))


def picture(layer: Layer, mask: Tensor) -> dict[str, Any]:
    """Return what a look at a mask as a matrix tells: empty neurons and inputs, and its picture."""
    matrix, plain = as_matrix(mask, layer.outputs), outputs_first(mask, layer.outputs)
    cells, (rows, columns) = masks.cells(matrix), matrix.shape
    # many numbers of few values: looking their texts up is ten times as fast as json.dumps
    texts = [", ".join(map(_THOUSANDTHS.__getitem__, row)) for row in (1000 * cells).round().int().tolist()]
    return {
        "empty_neurons": masks.empty_neurons(matrix),
        "empty_inputs": masks.empty_inputs(plain, layer.groups),
        "shrunk_size": masks.shrunk_size(plain, layer.groups),
        "rows": rows,
        "columns": columns,
        "cells": cells,
        "json": f'{{"rows": {rows}, "columns": {columns}, "density": [[{"], [".join(texts)}]]}}',
    }
