"""The warning of layers that lose nearly all their weights."""

from lightning_sparse.compat.lightning import rank_zero_warn
from lightning_sparse.monitor.layer import Layer

__all__ = ["CollapseAlarm"]


class CollapseAlarm:
    """Warns of each layer once, and again after it has recovered.

    Args:
        below: a layer is collapsing whose density falls below this; None: one with fewer weights than output neurons.
    """

    def __init__(self, below: float | None) -> None:
        self.below = below
        self._low: set[str] = set()

    def check(self, layer: Layer, active: int, step: int) -> None:
        """Warn if a layer that has ``active`` weights left is collapsing."""
        name, low = layer.name, self._is_low(layer, active)
        if low and active and name not in self._low:  # the methods themselves warn of layers without any weight
            rank_zero_warn(
                f"{name} is collapsing: {active} of its {layer.size} weights are left after step {step}, "
                f"{self._rule(layer)}. "
                "Keep it denser: a weaker regulariser or lower sparsity, min_layer_density, or exclude."
            )
        self._low = self._low | {name} if low else self._low - {name}

    def _is_low(self, layer: Layer, active: int) -> bool:
        return active < (layer.neurons if self.below is None else self.below * layer.size)

    def _rule(self, layer: Layer) -> str:
        if self.below is None:
            return f"fewer than its {layer.neurons} output neurons"
        return f"a density below {self.below:g}"
