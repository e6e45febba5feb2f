"""SWAT: sparse weight activation training (Raihan & Aamodt, NeurIPS 2020).

Section 3, Algorithm 1, the unstructured form. Decisions: what autograd saves of a layer's input is replaced, so the
sparse weight gradient is the only one that is ever computed; sets are found anew every ``update_every`` steps.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat import checks
from lightning_sparse.compat.lightning import LightningModule, Trainer
from lightning_sparse.compat.options import option
from lightning_sparse.families.latent import LatentWeight
from lightning_sparse.families.top_k import TopKCallback
from lightning_sparse.layers.activations import SparseInput
from lightning_sparse.layers.selection import ParameterChoice

__all__ = ["SWAT"]


class SWAT(TopKCallback):
    r"""Sparse Weight Activation Training: the largest weights forward and backward, the largest activations for ``dW``.

    The layer computes ``y = P x`` with ``P = W * 1_A``, A the ``1 - sparsity`` largest ``|W|``. Backward, the input's
    gradient is ``P^T dy``, and ``dW = dy top(x)^T`` for all weights, where ``top`` keeps the
    ``1 - activation_sparsity`` largest ``|x|`` of the layer's whole input, batch and features. The paper's SWAT-U has
    ``distribution="uniform"``, its SWAT-ERK ``"erk"``.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from lightning_sparse import SWAT
        >>> callback = SWAT(sparsity=0.9, activation_sparsity=0.9)

    Reference:
        "Sparse Weight Activation Training", NeurIPS 2020.
    """

    activation_sparsity: float | None = option(
        default=None,
        check=partial(checks.fraction, "None takes that of the weights."),
        doc="share of a layer's input that its weight gradient leaves out, in [0, 1]; None: as ``sparsity``. It "
        "concerns linear and convolution layers; others have sparse weights alone.",
    )

    def __post_init__(self) -> None:
        """Begin without hooks."""
        super().__post_init__()
        if self.activation_sparsity is None:
            self.activation_sparsity = self.sparsity_target
        self._hooked: list[str] = []

    @property
    def layer_gradient_density(self) -> dict[str, float]:
        """Share of the work that each layer's weight gradient takes: that of the input it is computed from."""
        assert self.activation_sparsity is not None
        return {n: 1 - self.activation_sparsity if n in self._hooked else 1.0 for n in self._weights}

    @property
    def extra_metrics(self) -> dict[str, float]:
        """Backward sparsity, to log."""
        return {"sparsity/backward": 1 - self.gradient_density}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the weights over, and hook the layers that read them; the hooks go when the fit ends."""
        super().on_fit_start(trainer, pl_module)
        self._hooked = []
        self._hook(pl_module, list(self._weights.values()))

    def attach_added(self, choices: Sequence[ParameterChoice], optimizer: Optimizer) -> None:
        """Hook the newcomers' layers, too."""
        super().attach_added(choices, optimizer)
        assert self._fit.module is not None
        self._hook(self._fit.module, [self._weights[choice.name] for choice in choices])

    def _hook(self, module: LightningModule, weights: Sequence[LatentWeight]) -> None:
        """Make the layers of ``weights`` save a sparse input."""
        names = {id(weight.parameter): weight.name for weight in weights}
        for layer in module.modules():
            name = names.get(id(getattr(layer, "weight", None)))
            if name is not None and SparseInput.suits(layer) and self.activation_sparsity:
                self._fit.handles += SparseInput(self.activation_sparsity).register(layer)
                self._hooked.append(name)

    def gradients(self, weight: LatentWeight, dP: Tensor, W: Tensor) -> None:
        """``dW = dP``, which came from sparse inputs."""
