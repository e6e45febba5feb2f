"""BlockStore: a method's weights as layers that hold blocks, for patterns of blocks."""

from collections.abc import Sequence

from torch import nn

from lightning_sparse.layers.blocks import BlockLinear
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules.patterns import Blocks
from lightning_sparse.storage.sparse import SparseStore
from lightning_sparse.storage.store import Stored
from lightning_sparse.weights.blocks import BlockWeight

__all__ = ["BlockStore"]


class BlockStore(SparseStore):
    """Layers that hold the nonzeros, and the positions of their blocks alone; all else is as with single nonzeros."""

    name = "block"
    exchanged = (nn.Linear,)

    def __init__(self, method: Stored) -> None:
        super().__init__(method)
        pattern = method.pattern
        if not isinstance(pattern, Blocks) or pattern.columns is None:
            raise ValueError(
                f"storage='block' must have pattern='block:RxC', such as 'block:16x16', got {method.pattern_name!r}. "
                "Give such a pattern, or storage='sparse', which takes any."
            )
        self._block = pattern.rows, pattern.columns

    def holds(self, choice: ParameterChoice) -> bool:
        """Tell whether the layer has blocks of this size."""
        return isinstance(choice.sparse, BlockLinear) and choice.sparse.block == self._block

    def weight(self, name: str, shape: Sequence[int], layer: nn.Module | None) -> BlockWeight:  # noqa: D102  (inherited)
        return BlockWeight(name, shape, layer, self._block)
