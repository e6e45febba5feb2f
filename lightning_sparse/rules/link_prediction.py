"""Link prediction on the bipartite graph of a layer: which links are likely by paths of length three.

A layer's matrix ``A``, ``(out, in)``, has a 1 for each link between an output and an input. The two nodes ``u, v`` of a
missing link have a local community: the nodes between them on paths ``u - z1 - z2 - v``. A node ``z`` of it has ``i_z``
links to other nodes of the community, and ``e_z`` links to nodes that are neither in it nor ``u`` or ``v``; ``e*_z`` is
``1 + e_z``. As ``z1`` and ``v`` are on the same side, ``i_z1`` is the number of their common neighbours, and
``e*_z1 = deg(z1) - i_z1``: one link of ``z1`` goes to ``u``.
"""

from typing import Literal

import torch
from torch import Tensor

__all__ = ["PREDICTORS", "Predictor", "ch2_l3n", "ch3_l3p", "num_paths"]

#: number of paths that are held at a time
_AT_ONCE = 1 << 20


def ch3_l3p(mask: Tensor) -> Tensor:
    """Return for each missing link the sum of ``1 / sqrt(e*_z1 e*_z2)`` over its paths of length three (CH3-L3).

    Time goes with the number of paths (``num_paths``), memory with the squares of the sides beside the result.

    Args:
        mask: the links, boolean ``(out, in)``.

    Returns:
        Scores ``(out, in)`` in single precision, on the CPU; those of links that are there have no meaning.

    >>> ch3_l3p(torch.tensor([[True, True, False], [False, True, True]]))[0, 2]
    tensor(1.)
    """
    A = mask.cpu()
    P, Q = (_external(side).clamp_(min=1).rsqrt_() for side in (A.double(), A.T.double()))  # P[v, z1] and Q[u, z2]
    outputs_of, inputs_of = _Neighbours(A.T), _Neighbours(A)
    most = max(1, int(A.sum(0).max()) * int(A.sum(1).max()))  # paths that begin with the same link
    scores = torch.zeros(A.numel(), dtype=torch.double)
    for links in torch.split(A.nonzero(), max(1, _AT_ONCE // most)):
        v, z2 = links.unbind(1)
        step, z1 = outputs_of.steps(z2)
        v, z2 = v[step], z2[step]
        step, u = inputs_of.steps(z1)
        v, z2, z1 = v[step], z2[step], z1[step]
        scores.index_add_(0, v * A.shape[1] + u, P[v, z1] * Q[u, z2])
    return scores.view(A.shape).float()


def ch2_l3n(mask: Tensor) -> Tensor:
    """Return for each missing link the sum of ``i_z / e*_z`` over the nodes of its local community (CH2-L3n).

    Arguments and result as in ``ch3_l3p``, on the device of ``mask``, by matrix products.

    >>> ch2_l3n(torch.tensor([[True, True, False], [False, True, True]]))[0, 2]
    tensor(2.)
    """
    A = mask.double()
    return (_isolation(A) @ A + (_isolation(A.T) @ A.T).T).float()  # rounded, what is equal but for its order is equal


def _external(A: Tensor) -> Tensor:
    """Return ``e*_z`` of each row ``z`` of a matrix of links, for each other row ``v``: ``(v, z)``."""
    common = A @ A.T
    return common.diagonal() - common


def _isolation(A: Tensor) -> Tensor:
    """Return ``i_z / e*_z``, ``(v, z)``; 0 where each link of ``z`` leads to a neighbour of ``v``."""
    e = _external(A)
    return torch.where(e > 0, A @ A.T / e, 0.0)


def num_paths(mask: Tensor) -> float:
    """Return the number of walks of length three from an output to an input."""
    A = mask.double()
    return float(A.sum(1) @ A @ A.sum(0))


class _Neighbours:
    """The neighbours of each row of a matrix of links."""

    def __init__(self, A: Tensor) -> None:
        self.counts = A.sum(1)
        self._starts = self.counts.cumsum(0) - self.counts
        self._ends = A.nonzero()[:, 1]

    def steps(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Return all steps from ``nodes``: the index of the node that each begins at, and the neighbour it ends at."""
        n = self.counts[nodes]
        origin = torch.arange(len(nodes)).repeat_interleave(n)
        number = torch.arange(len(origin)) - (n.cumsum(0) - n)[origin]  # of each step among those of its node
        return origin, self._ends[self._starts[nodes][origin] + number]


Predictor = Literal["CH3-L3p", "CH2-L3n"]

#: the predictors by the names of the authors' program
PREDICTORS = {"CH3-L3p": ch3_l3p, "CH2-L3n": ch2_l3n}
