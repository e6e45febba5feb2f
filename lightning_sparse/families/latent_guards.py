"""What a method with latent weights refuses."""

from collections.abc import Sequence

from lightning_sparse.compat.lightning import MisconfigurationException, Trainer
from lightning_sparse.compat.optimizers import wrapped
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.trainer.verbs import Verbs
from lightning_sparse.weights.latent import LatentWeight

__all__ = ["refuse_other_outputs", "refuse_other_steps", "refuse_sparse_layers"]


def refuse_other_steps(method: Verbs, trainer: Trainer) -> None:
    """Raise if an optimizer changes weights outside of its steps, or puts the sparse ones back within them."""
    for optimizer in (each for one in trainer.optimizers for each in wrapped(one)):
        kind = type(optimizer).__name__
        if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
            raise MisconfigurationException(
                f"{method!r} cannot train with {kind}, which changes weights "
                "outside of its steps, where they must stay sparse. Use an optimizer without train() and eval()."
            )
        by_hand = not trainer.lightning_module.automatic_optimization
        if callable(getattr(optimizer, "first_step", None)) and not by_hand:
            raise MisconfigurationException(
                f"{method!r} cannot train with {kind}, which puts back, within its step, weights that it noted "
                "before the loss was evaluated: the sparse ones, in the place of the dense that are trained. Use a "
                "first-order optimizer such as SGD or AdamW, or call first_step and second_step yourself, with "
                "automatic_optimization=False."
            )


def refuse_sparse_layers(method: Verbs, choices: Sequence[ParameterChoice]) -> None:
    """Raise if a sparse layer holds one of the weights."""
    for choice in choices:
        if choice.sparse is not None:
            raise MisconfigurationException(
                f"{choice.name} is held by a sparse layer, but {method!r} trains dense latent weights. Leave it out "
                "with exclude, or make sparse layers dense with lightning_sparse.storage.to_dense(module)."
            )


def refuse_other_outputs(method: Verbs, weight: LatentWeight, choice: ParameterChoice) -> None:
    """Raise if thresholds belong to other neurons than those of the layer now."""
    per_neuron = weight.trained is not None and weight.trained.of_neurons
    if per_neuron and weight.outputs != choice.outputs:
        raise MisconfigurationException(
            f"The state of {method!r} has thresholds of {weight.name} for neurons along dimension "
            f"{weight.outputs.axis}, but those of {choice.kind} lie along dimension {choice.outputs.axis}. To go on as "
            f"before, call lightning_sparse.register_layer with out_axis={weight.outputs.axis} for the layer's class; "
            "to begin afresh, load the weights alone: MyModule.load_from_checkpoint(path)."
        )
