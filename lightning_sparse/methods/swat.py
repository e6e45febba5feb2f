"""SWAT: sparse weight activation training (Raihan & Aamodt, NeurIPS 2020).

Section 3, Algorithm 1, unstructured. Decision: what autograd saves of a layer's input is replaced, so the sparse weight
gradient is the only one that is ever computed.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import LightningModule, Trainer
from lightning_sparse.compat.options import option
from lightning_sparse.families.latent import LatentWeight
from lightning_sparse.families.top_k import TopKCallback
from lightning_sparse.layers.activations import save_sparse_inputs
from lightning_sparse.layers.selection import ParameterChoice

__all__ = ["SWAT"]


class SWAT(TopKCallback):
    r"""Sparse Weight Activation Training: the largest weights forward and backward, the largest activations for ``dW``.

    The layer computes ``y = P x`` with ``P = W * 1_A``, A the ``1 - sparsity`` largest ``|W|``. Backward, the input's
    gradient is ``P^T dy``, and ``dW = dy top(x)^T`` for all weights, where ``top`` keeps the
    ``1 - activation_sparsity`` largest ``|x|`` of the layer's whole input. SWAT-ERK is ``distribution="erk"``.

    Example:
        >>> from lightning_sparse import SWAT
        >>> callback = SWAT(sparsity=0.9, activation_sparsity=0.9)

    Reference:
        "Sparse Weight Activation Training", NeurIPS 2020.
    """

    joins = True

    activation_sparsity: float | None = option(
        default=None,
        check=partial(checks.fraction, "None takes that of the weights."),
        doc="share of the input of linear and convolution layers that ``dW`` leaves out, in [0, 1]; None: as sparsity.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._left_out = self.sparsity_target if self.activation_sparsity is None else self.activation_sparsity
        self._hooked: list[str] = []

    @property
    def layer_gradient_density(self) -> dict[str, float]:
        """Share of the work that each layer's weight gradient takes: that of the input it is computed from."""
        return {name: 1 - self._left_out if name in self._hooked else 1.0 for name in self._weights}

    @property
    def extra_metrics(self) -> dict[str, float]:
        """Backward sparsity, to log."""
        return {"sparsity/backward": 1 - self.gradient_density}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the weights over, and hook the layers that read them; the hooks go when the fit ends."""
        super().on_fit_start(trainer, pl_module)
        self._hooked = self._hook(self._weights)

    def attach_added(self, choices: Sequence[ParameterChoice], optimizer: Optimizer) -> None:
        """Hook the newcomers' layers, too."""
        super().attach_added(choices, optimizer)
        self._hooked += self._hook({choice.name: self._weights[choice.name] for choice in choices})

    def _hook(self, weights: Mapping[str, LatentWeight]) -> list[str]:
        """Make the layers of ``weights`` save a sparse input; return the weights that they read."""
        assert self._fit.module is not None
        parameters = {name: weight.parameter for name, weight in weights.items()}
        return save_sparse_inputs(self._fit.module, parameters, self._left_out, self._fit.handles)

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """``dW = dP``, which came from sparse inputs."""
