"""Where the blocks of a matrix are: the structure of the matrix of blocks, and the way from single nonzeros and back.

The values of a matrix stay in the order of their positions. So those of a row of blocks, R rows of the matrix, are a
dense matrix ``(R, blocks C)``, whose columns are those of one block after the other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_sparse.kernels.structure import CSR, Structure, flat_positions, structure

__all__ = ["block_structure", "single_nonzeros"]


def block_structure(positions: Tensor, shape: Sequence[int], block: tuple[int, int]) -> Structure:
    """Return the structure of a weight whose nonzeros are blocks.

    Args:
        positions: flat ones of the nonzeros, ascending and different.
        shape: of the weight, ``(out, in)``.
        block: outputs and inputs of a block, which divide those of the weight.

    Raises:
        ValueError: the weight cannot be divided so, or a block is there in part.

    >>> found = block_structure(torch.tensor([2, 3, 6, 7]), (2, 4), (2, 2))
    >>> found.matrix.crow.tolist(), found.matrix.col.tolist(), found.row_lengths.tolist()
    ([0, 1], [1], [2, 2])
    """
    (out, width), (rows, columns) = shape, block
    if out % rows or width % columns:
        raise ValueError(f"block must divide the weight's shape {tuple(shape)}, got {block}. Give divisors of these.")
    first = positions[(positions % columns == 0) & (positions // width % rows == 0)]
    blocks = first // (rows * width) * (width // columns) + first % width // columns
    found = structure(blocks, (out // rows, width // columns))._replace(block=block)
    if not torch.equal(flat_positions(*single_nonzeros(found)), positions.long()):
        raise ValueError(
            f"positions must be those of whole blocks of {rows} x {columns}, got {len(positions)} of which some are "
            "not. Give those of a mask with such blocks, as pattern='block:RxC' makes it, or use SparseLinear."
        )
    return found


def single_nonzeros(blocks: Structure) -> CSR:
    """Return the nonzeros of a matrix of blocks one by one, in the order of their positions."""
    (rows, columns), (crow, col, shape) = blocks.block, blocks.matrix
    lengths = crow.diff().repeat_interleave(rows)  # in blocks
    ends = lengths.cumsum(0)
    shifts = crow[:-1].repeat_interleave(rows) - (ends - lengths)  # from the place among rows of blocks to the block
    places = torch.arange(len(col) * rows, device=col.device) + shifts.repeat_interleave(lengths)
    inside = torch.arange(columns, dtype=col.dtype, device=col.device)
    single = (col[places] * columns)[:, None] + inside
    return CSR(pad(ends * columns, (1, 0)).int(), single.view(-1), (shape[0] * rows, shape[1] * columns))
