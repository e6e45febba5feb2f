"""Adopt: whether a fit goes on with what a callback holds of its weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.trainer.guards import refuse_other_weights, warn_of_other_weights
from lightning_sparse.trainer.verbs import Verbs

__all__ = ["Adoption", "adopt"]

#: ``"resumed"``: the state is a checkpoint's; ``"continued"``: an earlier fit's; ``"fresh"``: there is none of use
Adoption = Literal["resumed", "continued", "fresh"]


def adopt(
    method: Verbs,
    choices: Sequence[ParameterChoice],
    held: Mapping[str, tuple[int, ...]],
    resumed: bool,
    continues: Callable[[], bool],
) -> Adoption:
    """Tell how a fit begins.

    Args:
        method: the callback.
        choices: the weights of this fit.
        held: the shapes of the weights that the callback holds a state of, by name; empty: it has none, which is so of
            a checkpoint from before the fit, as LearningRateFinder writes it.
        resumed: the state was loaded from a checkpoint.
        continues: tells whether the parameters hold just what the state of an earlier fit says; not called unless the
            weights are the same.

    Raises:
        MisconfigurationException: the checkpoint's state is of other weights.
    """
    here = {choice.name: choice.shape for choice in choices}
    if resumed and held:
        refuse_other_weights(method, here, held)
        return "resumed"
    if held and here == held and continues():
        return "continued"
    if held:
        warn_of_other_weights(method)
    return "fresh"
