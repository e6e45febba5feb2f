"""BlockLinear: a sparse linear layer whose nonzeros are blocks, of which it stores the positions alone.

The values stay in the order of their positions, as in every sparse layer; those of a row of blocks are a dense matrix
(``kernels.block_structure``). So whatever knows sparse layers knows this one: checkpoints, optimizer state, methods
that move connections. A block has 12 bytes of indices, as many as a single nonzero has in the other layers.
"""

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_sparse.compat import checks
from lightning_sparse.kernels.block_structure import block_structure, single_nonzeros
from lightning_sparse.kernels.blocks import gradient, matmul, matmul_transposed
from lightning_sparse.kernels.positions import moved
from lightning_sparse.kernels.structure import CSR, Structure, flat_positions, structure
from lightning_sparse.layers.functional import exact_dtype, without_autocast
from lightning_sparse.layers.sparse import SparseLinear, check_drawn, make_sparse_
from lightning_sparse.rules import sampling

__all__ = ["BlockLinear", "make_blocks_"]


def block_linear(x: Tensor, values: Tensor, bias: Tensor | None, weight: Structure) -> Tensor:
    """Return ``x W.T + bias``.

    Args:
        x: ``(..., in)``.
        values: the nonzeros of the weight ``(out, in)`` in the order of their positions.
        bias: ``(out,)`` or None.
        weight: where its blocks are.
    """
    result: Tensor = _BlockLinear.apply(x, values, bias, weight)  # type: ignore[no-untyped-call]
    return result


class BlockLinear(SparseLinear):
    """``nn.Linear`` whose weight consists of blocks of R outputs by C inputs, most of them absent.

    The blocks that are there are drawn uniformly, and values as in ``SparseLinear``.

    Args:
        in_features: size of the input's last dimension, a multiple of C.
        out_features: size of the output's last dimension, a multiple of R.
        blocks: number of blocks.
        block: their size ``(R, C)``.
        bias: add a bias.
        generator: for all draws, on the CPU; default: torch's.
        dtype: of values and bias.

    Attributes:
        block: as given.
        block_crow: where each row of blocks begins among them, ``(out / R + 1,)``, int32.
        block_col: the column of each block, counted in blocks, ``(blocks,)``, int32.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> layer = BlockLinear(512, 256, blocks=10, block=(16, 16))
        >>> layer(torch.ones(8, 512)).shape, layer.values.shape, layer.block_col.shape
        (torch.Size([8, 256]), torch.Size([2560]), torch.Size([10]))
    """

    products = "blocks"
    indices = "block_crow", "block_col", "transposed_crow", "transposed_col", "permutation"
    block_crow: Tensor
    block_col: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: int,
        block: tuple[int, int] = (16, 16),
        bias: bool = True,
        generator: Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        checks.integer(1, "It is the size of the input's last dimension.", in_features=in_features)
        checks.integer(1, "It is the size of the output's last dimension.", out_features=out_features)
        checks.pair(1, "(16, 16) is usual.", block=block)
        checks.integer(0, "It is the number of blocks.", blocks=blocks)
        check_drawn(bias, generator, dtype)
        grid = out_features // block[0], in_features // block[1]
        if blocks > math.prod(grid):
            raise ValueError(f"blocks must be from 0 to {math.prod(grid)}, as many as fit, got {blocks!r}.")
        generator = torch.default_generator if generator is None else generator
        drawn = structure(sampling.distinct(blocks, math.prod(grid), generator), grid)._replace(block=block)
        dense = nn.Linear(in_features, out_features, bias, device="meta", dtype=dtype)
        positions = flat_positions(*single_nonzeros(drawn))
        self.__dict__ = make_blocks_(dense, block, positions, generator).__dict__

    @property
    def crow(self) -> Tensor:  # type: ignore[override]  # made when asked for
        """Where each row of the weight begins among the nonzeros, ``(out + 1,)``, int32."""
        return self.matrix.crow

    @property
    def col(self) -> Tensor:  # type: ignore[override]  # made when asked for
        """The column of each nonzero, ``(nnz,)``, int32."""
        return self.matrix.col

    @property
    def matrix(self) -> CSR:  # noqa: D102  (inherited)
        return single_nonzeros(self.structure)

    def structure_at(self, positions: Tensor) -> Structure:
        """Return what the structure would be; raise if the positions are not those of whole blocks."""
        return block_structure(positions, self.shape, self.block)

    def structure_moved(self, dropped: Tensor, grown: Tensor) -> tuple[Structure, Tensor]:  # noqa: D102  (inherited)
        device = self.values.device
        positions, source = moved(*(x.cpu() for x in (self.positions, dropped, grown)))
        return self.structure_at(positions.to(device)), source.to(device)

    @classmethod
    def from_dense(  # noqa: D102  (inherited)
        cls, layer: nn.Linear | nn.Conv2d, positions: Tensor | None = None, block: tuple[int, int] = (16, 16)
    ) -> "BlockLinear":
        return make_blocks_(SparseLinear.from_dense(layer, positions), block)

    def _multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the output; on CUDA products run in the dtype that is asked for, on tensor cores."""
        return block_linear(x.to(dtype) if x.is_cuda else x, self.values, self.bias, self.structure)

    def extra_repr(self) -> str:
        """Show what a sparse layer shows, and the size of the blocks."""
        return f"{super().extra_repr()}, block={self.block}"


def make_blocks_(
    layer: nn.Linear, block: tuple[int, int], positions: Tensor | None = None, generator: Generator | None = None
) -> BlockLinear:
    """Turn a linear layer, dense or sparse, into one of blocks, in place.

    Args:
        layer: exactly of type ``nn.Linear`` or ``SparseLinear``.
        block: outputs and inputs of a block.
        positions: flat ones of the connections to keep, ascending, if the layer is dense: those of whole blocks.
        generator: for values of layers on the meta device; on the CPU.

    Raises:
        TypeError: the layer is of another type.
        ValueError: the weight cannot be divided into blocks, or some are there in part.
    """
    if type(layer) not in (nn.Linear, SparseLinear):
        raise TypeError(f"Only nn.Linear and SparseLinear have a form of blocks, not {type(layer).__name__}.")
    sparse: Any = layer
    if positions is not None:
        block_structure(positions, tuple(layer.weight.shape), block)  # raises before anything has changed
        sparse = make_sparse_(layer, positions, generator)
    found = block_structure(sparse.positions, sparse.shape, block)
    for name in sparse.indices:
        delattr(sparse, name)
    sparse.__class__, sparse.block = BlockLinear, block
    sparse.register_structure(found)
    assert isinstance(sparse, BlockLinear)
    return sparse


class _BlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, weight: Structure) -> Tensor:
        ctx.save_for_backward(x, values, *weight.tensors)  # let go after the backward pass, the graph may live on
        ctx.kind = weight.backend, weight.block
        dtype = _dtype(x, values)
        y = matmul(_rows(x, dtype), values.to(dtype), weight)
        if bias is not None:
            y += bias.to(dtype)
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, *indices = ctx.saved_tensors
        weight, dtype = Structure.of(indices, *ctx.kind), _dtype(x, values)
        delta = _rows(dy, dtype)
        dx = dvalues = dbias = None
        if ctx.needs_input_grad[0]:
            dx = matmul_transposed(delta, values.to(dtype), weight).view(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dvalues = gradient(delta, _rows(x, dtype), weight).to(values.dtype)
        if ctx.needs_input_grad[2]:
            dbias = delta.sum(0, dtype=exact_dtype(values.dtype)).to(values.dtype)
        return dx, dvalues, dbias, None


def _dtype(x: Tensor, values: Tensor) -> torch.dtype:
    """Return what products run in: sums are in float32 at least, which a GPU has by itself."""
    return x.dtype if x.is_cuda else exact_dtype(values.dtype)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``(..., features)`` as ``(n, features)``."""
    return x.reshape(-1, x.shape[-1]).to(dtype)
