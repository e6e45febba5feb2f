"""BlockWeight: one weight of a layer of blocks while it is trained."""

from collections.abc import Sequence

from torch import Generator, Tensor, nn

from lightning_sparse.layers.blocks import make_blocks_
from lightning_sparse.layers.sparse import SparseLayer
from lightning_sparse.weights.sparse import SparseWeight

__all__ = ["BlockWeight"]


class BlockWeight(SparseWeight):
    """A sparse weight whose connections come and go in blocks.

    Args:
        name: of the dense weight in the LightningModule.
        shape: its shape.
        layer: the layer that holds it, which ``start`` makes one of blocks; None outside fit.
        block: outputs and inputs of a block.
    """

    def __init__(self, name: str, shape: Sequence[int], layer: nn.Module | None, block: tuple[int, int]) -> None:
        super().__init__(name, shape, layer)
        self.block = block

    def _made_sparse(self, positions: Tensor, generator: Generator) -> SparseLayer:
        assert isinstance(self.layer, nn.Linear)
        return make_blocks_(self.layer, self.block, positions, generator)
