"""RandomPruning: a random mask, drawn before training and kept (Liu et al., ICLR 2022).

Decision: each layer's number of connections is exact, where a draw for each connection would meet it on average.
"""

from lightning_sparse.families.masked import MaskedCallback

__all__ = ["RandomPruning"]


class RandomPruning(MaskedCallback):
    """Random pruning at initialization: every layer keeps its share of connections, drawn uniformly.

    The baseline that every other method has to beat. It needs neither data nor a loss.

    Example:
        >>> from lightning_sparse import RandomPruning
        >>> callback = RandomPruning(sparsity=0.9, distribution="erk")

    Reference:
        "The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training",
        ICLR 2022.
    """

    moves = False
