"""BeforeTraining: the base of methods that choose their connections once, by a score, before the first step."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.compat.lightning import LightningModule, MisconfigurationException, Trainer, rank_zero_info
from lightning_sparse.compat.options import fixed, option
from lightning_sparse.families import starts
from lightning_sparse.families.common import SPARSITY
from lightning_sparse.families.masked import DenseOnly, MaskedCallback
from lightning_sparse.families.shares import floors
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.rules import select
from lightning_sparse.rules.budgets import Distribution, budget
from lightning_sparse.trainer.guards import warn_of_equal_scores
from lightning_sparse.trainer.probe import Probe, probing
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.units import Units

__all__ = ["BeforeTraining", "budgets", "of_units", "of_weights"]


class BeforeTraining(DenseOnly, MaskedCallback):
    """Keep the connections with the largest scores of all layers together; they stay to the end of training.

    The scores are computed when training begins (``on_train_start``), of a fresh run only: one that is resumed, and a
    second fit, keep their masks. Until then, in the sanity check of validation, the network is dense. Weights that join
    an optimizer later are scored by themselves when they do. Everything is computed on copies: batches, random draws,
    batch-norm statistics, metrics and logs of the run are those it would have had.
    """

    sparsity_target: float = option(alias="sparsity", kw_only=False, doc=SPARSITY)
    initial: str = fixed(default="random")  # scores choose
    distribution: Distribution | Mapping[str, float] = fixed(default="erk")  # layers compete
    seed: int | None = fixed(default=None)  # nothing is drawn

    #: the scores need the loss of ``training_step``
    needs_loss = True

    moves = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._scored = False

    @property
    def runs_network(self) -> bool:
        """The scores call ``training_step``."""
        return self.needs_loss

    @property
    def planned_density(self) -> dict[str, float]:
        """None: the scores tell."""
        return {}

    @property
    def num_rounds(self) -> int:
        """How often scores are computed, of a network that gets sparser from one to the next."""
        return 1

    @abstractmethod
    def scores(self, probe: Probe) -> list[Tensor]:
        """Return the score of each of ``probe.weights``, which are those of the masked network; the largest stay."""

    def choose_masks(self, probe: Probe) -> list[Tensor]:
        """Return the masks: round by round, down to the budget."""
        weights = self.units([self._weights[name] for name in probe.names])
        chosen = [torch.ones_like(weight.mask) for weight in weights]
        sizes = [weight.size for weight in weights]
        final = budget(self.sparsity_target, sum(sizes))
        at_least = floors(weights, self.min_layer_density, final)
        for k in budgets(sum(sizes), final, self.num_rounds):
            scores = self.finite_scores(probe)
            scores = [of_units(weight, score) for weight, score in zip(weights, scores, strict=True)]
            ranked = [
                select.first_of_rows(score, weight.nonempty, among)
                for score, weight, among in zip(scores, weights, chosen, strict=True)
            ]
            counts = self.pattern.count_global_top_k(weights, ranked, k, chosen, at_least)
            chosen = [self.pattern.top_k(*each) for each in zip(weights, ranked, counts, chosen, strict=True)]
            for W, mask in zip(probe.weights, of_weights(weights, chosen), strict=True):
                select.zero_outside_(W.data, mask)
        return of_weights(weights, chosen)

    def finite_scores(self, probe: Probe) -> list[Tensor]:
        """Return the scores; raise if some are not finite, and warn if a weight's are all equal."""
        scores = self.scores(probe)
        for name, score in zip(probe.names, scores, strict=True):
            if not score.isfinite().all():
                raise MisconfigurationException(
                    f"{self!r} got scores of {name} that are NaN or infinite. Check that the loss and its "
                    "gradients are finite at the start: input values, initial weights, precision."
                )
        alike = [name for name, score in zip(probe.names, scores, strict=True) if select.all_equal(score)]
        warn_of_equal_scores(self, alike)
        return scores

    @property
    def needs_whole_weights(self) -> str | None:
        """Scores are of the whole network."""
        return (
            "Choose the connections in a fit of one step on one process, write them with callback.save_masks(path), "
            "and train with FixedMask(initial=path)."
        )

    # ------------------------------------------------------------------ when

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the weights over; refuse a module whose loss cannot be asked for."""
        super().on_fit_start(trainer, pl_module)
        if self.needs_loss and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{self!r} needs the loss that training_step returns, but {type(pl_module).__name__} "
                "optimizes manually. Set automatic_optimization=True, or use SynFlow or RandomPruning, which need none."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the connections, unless a checkpoint or an earlier fit has them."""
        super().on_train_start(trainer, pl_module)
        if not self._scored:
            self._prune(list(self._weights.values()))

    def attach_added(self, choices: Sequence[ParameterChoice], optimizer: Optimizer) -> None:
        """Choose the connections of weights that joined an optimizer later, by their current scores."""
        super().attach_added(choices, optimizer)
        self._prune([self._weights[choice.name] for choice in choices])

    def _prune(self, weights: Sequence[Weight]) -> None:
        assert self._fit.trainer is not None
        assert self._fit.module is not None
        with probing(self._fit.trainer, self._fit.module, [weight.name for weight in weights]) as probe:
            chosen = self.choose_masks(probe)
        scaled = starts.made_anew(self, self._fit.module, weights, [weight.given for weight in weights])
        for weight, mask in zip(weights, chosen, strict=True):
            weight.keep(mask)
            if weight.name in scaled:
                weight.scale_to_fan_in_()
        self._scored = True
        rank_zero_info(f"{self!r} of lightning_sparse: density {self.density:.4g}")

    # ------------------------------------------------------------------ the family's verbs and state

    def initial_masks(self, weights: Sequence[Weight]) -> None:
        """Leave all weights active until there are scores."""
        weights = self.units(weights)
        floors(weights, self.min_layer_density, budget(self.sparsity_target, sum(weight.size for weight in weights)))
        self._scored = False

    def state_dict(self) -> dict[str, Any]:
        """Return masks and whether they come from scores."""
        return {**super().state_dict(), "scored": self._scored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state."""
        super().load_state_dict(state_dict)
        self._scored = state_dict["scored"]


def of_units(weight: Weight, scores: Tensor) -> Tensor:
    """Return the scores of units: the means of those of their members."""
    return weight.tiles.means(scores) if isinstance(weight, Units) else scores


def of_weights(weights: Sequence[Weight], masks: Sequence[Tensor]) -> list[Tensor]:
    """Return the masks of weights, of which ``masks`` says which units are active."""
    each = zip(weights, masks, strict=True)
    return [weight.tiles.whole(mask) if isinstance(weight, Units) else mask for weight, mask in each]


def budgets(size: int, k: int, rounds: int) -> list[int]:
    """Return the number of active weights after each round: ``size (k / size)^(r / rounds)``, at last just ``k``.

    >>> budgets(1000, 10, 4)
    [316, 100, 32, 10]
    """
    density = k / max(size, 1)
    return [round(size * density ** (r / rounds)) for r in range(1, rounds)] + [k]
