"""One of the weights that a monitor looks at, and what a look at its mask tells."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.accounting import masks
from lightning_sparse.compat.shards import local
from lightning_sparse.layers.selection import ParameterChoice, select_parameters
from lightning_sparse.rules.matrices import FIRST, Outputs, as_matrix, outputs_first
from lightning_sparse.rules.parts import WHOLE, Whole, part_of
from lightning_sparse.rules.select import positions
from lightning_sparse.rules.tiles import Tiles
from lightning_sparse.trainer.callback import SparseCallback

__all__ = ["COUNTS", "Layer", "layers_of", "picture"]

#: what is counted of each layer's mask, and of the whole
COUNTS = ("empty_neurons", "empty_inputs", "shrunk_size")

_AT_ONCE = 1 << 20  # connections of a mask that are looked through
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
        part: what is here of it.
    """

    name: str
    shape: tuple[int, ...]
    groups: int
    outputs: Outputs
    method: SparseCallback | None
    part: Whole

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
        """Return where the weight is active now, of what is here of it."""
        if self.method is None:
            return torch.ones(self.part.shape_here(self.shape), dtype=torch.bool)
        return local(self.method.mask(self.name))


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
            part_of(choice.parameter),
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
    """Return what a look at a mask as a matrix tells: empty neurons and inputs, and its picture.

    Args:
        layer: whose it is.
        mask: of what is here of the layer; all processes call this together.
    """
    found = _seen(layer, mask) if layer.part is WHOLE else _seen_together(layer, mask)
    # many numbers of few values: looking their texts up is ten times as fast as json.dumps
    thousandths = (1000 * found["cells"]).round().int().tolist()
    texts = [", ".join(map(_THOUSANDTHS.__getitem__, row)) for row in thousandths]
    size = f'"rows": {found["rows"]}, "columns": {found["columns"]}'
    return {**found, "json": f'{{{size}, "density": [[{"], [".join(texts)}]]}}'}


def _seen(layer: Layer, mask: Tensor) -> dict[str, Any]:
    matrix, plain = as_matrix(mask, layer.outputs), outputs_first(mask, layer.outputs)
    return {
        "empty_neurons": masks.empty_neurons(matrix),
        "empty_inputs": masks.empty_inputs(plain, layer.groups),
        "shrunk_size": masks.shrunk_size(plain, layer.groups),
        "rows": matrix.shape[0],
        "columns": matrix.shape[1],
        "cells": masks.cells(matrix),
    }


def _seen_together(layer: Layer, mask: Tensor) -> dict[str, Any]:
    """Return the same of a divided layer: connections are counted by output, input and cell, and counts added up."""
    rows, inputs = layer.neurons, layer.inputs
    columns = layer.size // max(rows, 1)
    kernel = columns * layer.groups // max(inputs, 1)
    down, across = (torch.tensor(masks.edges(n)) for n in (rows, columns))
    lengths = [rows, inputs, (len(down) - 1) * (len(across) - 1)]
    counts = [torch.zeros(n, dtype=torch.int32 if layer.size < 1 << 31 else torch.int64) for n in lengths]
    tiles = Tiles(layer.shape, layer.outputs, 1, 1)
    for first, flat in enumerate(torch.split(mask.reshape(-1), _AT_ONCE)):
        group, output, input_, place = tiles.coordinates(layer.part.positions(positions(flat).cpu() + first * _AT_ONCE))
        row, column = group * (rows // layer.outputs.groups) + output, input_ * kernel + place
        input_ += row.div(rows // layer.groups, rounding_mode="floor") * (inputs // layer.groups)
        cell = _between(down, row) * (len(across) - 1) + _between(across, column)
        for count, numbers in zip(counts, (row, input_, cell), strict=True):
            count += torch.bincount(numbers, minlength=len(count))
    of_rows, of_inputs, of_cells = torch.split(layer.part.sums(torch.cat(counts)), lengths)
    touched = [(x > 0).view(layer.groups, -1).sum(1) for x in (of_rows, of_inputs)]
    return {
        "empty_neurons": int((of_rows == 0).sum()),
        "empty_inputs": int((of_inputs == 0).sum()),
        "shrunk_size": int((touched[0] * touched[1]).sum()) * kernel,
        "rows": rows,
        "columns": columns,
        "cells": of_cells.view(len(down) - 1, -1).double() / (down.diff().unsqueeze(1) * across.diff()),
    }


def _between(edges: Tensor, numbers: Tensor) -> Tensor:
    """Return between which two of the edges each number lies."""
    return torch.bucketize(numbers, edges[1:], right=True)
