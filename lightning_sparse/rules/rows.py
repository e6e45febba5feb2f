"""The same number of connections for each output: pure functions of tensors. Counts are exact."""

import torch
from torch import Tensor

from lightning_sparse.rules import ties
from lightning_sparse.rules.even import evenly
from lightning_sparse.rules.matrices import FIRST, Outputs, as_matrix, write_matrix

__all__ = ["counts_of_rows", "top_k_of_rows"]


def counts_of_rows(k: int, rows: int) -> Tensor:
    """Divide ``k`` among so many rows: each gets ``k // rows``, and ``k % rows`` of them, evenly spread, one more.

    >>> counts_of_rows(10, 4)
    tensor([3, 2, 3, 2])
    """
    counts = torch.full((rows,), k // rows)
    counts[evenly(rows, k % rows)] += 1
    return counts


def top_k_of_rows(scores: Tensor, k: int, outputs: Outputs = FIRST) -> Tensor:
    """Mark the largest scores of each row, exactly ``k`` in all, divided as ``counts_of_rows`` says.

    Args:
        scores: of a weight, of its shape.
        k: from 0 to their number.
        outputs: where the rows lie.

    >>> top_k_of_rows(torch.tensor([[3.0, 9.0, 5.0], [1.0, 0.0, 2.0]]), 3)
    tensor([[False,  True,  True],
            [False, False,  True]])
    """
    matrix = as_matrix(scores, outputs)
    order = ties.spread(torch.arange(matrix.numel()), matrix.shape).view(matrix.shape).argsort(1).to(matrix.device)
    best = matrix.gather(1, order).argsort(dim=1, descending=True, stable=True)  # of equals the first in the order
    counts = counts_of_rows(k, len(matrix)).to(matrix.device)
    within = torch.arange(matrix.shape[1], device=matrix.device) < counts.unsqueeze(1)
    chosen = torch.zeros_like(matrix, dtype=torch.bool).scatter_(1, order.gather(1, best), within)
    mask = torch.empty_like(scores, dtype=torch.bool)
    write_matrix(mask, as_matrix(mask, outputs).copy_(chosen), outputs)
    return mask
