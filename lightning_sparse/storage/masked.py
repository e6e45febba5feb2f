"""MaskedStore: dense parameters, and a boolean mask beside each."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.compat.shards import is_sharded, local, whole
from lightning_sparse.kernels.structure import flat_positions
from lightning_sparse.layers.selection import ParameterChoice
from lightning_sparse.layers.sparse import dense_weight
from lightning_sparse.rules import select
from lightning_sparse.storage.checkpoint import take_sparse
from lightning_sparse.storage.store import Store, Stored
from lightning_sparse.trainer.adopt import Adoption, adopt
from lightning_sparse.trainer.agreement import refuse_broken_positions, refuse_other_counts
from lightning_sparse.weights.base import Weight
from lightning_sparse.weights.masked import MaskedWeight
from lightning_sparse.weights.sharded import ShardedWeight

__all__ = ["MaskedStore"]


class MaskedStore(Store):
    """Dense parameters, and a boolean mask beside each."""

    name = "masked"
    keeps_parts = True

    def __init__(self, method: Stored) -> None:
        super().__init__(method)
        if method.plain_checkpoints is not None:
            raise ValueError(
                f"plain_checkpoints is for storage='sparse', got {method.plain_checkpoints!r} with storage='masked', "
                "whose checkpoints are always plain. Leave it out."
            )

    def holds(self, choice: ParameterChoice) -> bool:  # noqa: D102  (inherited)
        return choice.sparse is None

    def adopt(  # noqa: D102  (inherited)
        self, choices: Sequence[ParameterChoice], held: Mapping[str, Weight], resumed: bool
    ) -> tuple[Adoption, dict[str, Weight]]:
        shapes = {name: weight.shape for name, weight in held.items()}
        adoption = adopt(
            self.method, choices, shapes, resumed, lambda: all(_fits(self.method, c, held[c.name]) for c in choices)
        )
        weights = self.add(choices)
        for name, weight in weights.items() if adoption != "fresh" else ():
            self.restore(weight, held[name])
        return adoption, weights

    def add(self, choices: Sequence[ParameterChoice]) -> dict[str, Weight]:  # noqa: D102  (inherited)
        return {choice.name: _weight(choice) for choice in choices}

    def take(self, states: dict[str, Any], module: dict[str, Any]) -> bool:
        """Have what sparse layers have written loaded by dense ones."""
        sparse = take_sparse(module)
        module.update({name: dense_weight(*entries) for name, entries in sparse.items()})
        others = {name: state for name, state in states.items() if "shape" in state and "mask" not in state}
        for name, state in others.items():
            mask = torch.zeros(state["shape"].tolist(), dtype=torch.bool)
            if "positions" in state:
                refuse_broken_positions(name, state["positions"], mask.numel())
                mask.view(-1)[state["positions"].long()] = True
            elif name in sparse:
                _, crow, col, shape = sparse[name]
                mask.view(-1)[flat_positions(crow, col, shape).cpu()] = True
            else:
                continue  # it will be missed
            states[name] = {"mask": mask, "buffers": {}}
        return bool(others)

    def carried(self, weight: Weight, x: Tensor) -> Tensor | None:
        """Return a dense tensor that is 0 but at the connections."""
        if tuple(x.shape) != (weight.num_active,):
            return None
        result = x.new_zeros(weight.size)
        result[weight.active_indices.to(x.device)] = x
        weight.forget_indices()
        return result.view(weight.shape)

    def wrote(self, state: Mapping[str, Any]) -> bool:  # noqa: D102  (inherited)
        return "mask" in state

    def _load(self, name: str, state: Mapping[str, Any], held: Mapping[str, Weight]) -> Weight:
        return MaskedWeight(name, state["mask"], buffers=dict(state["buffers"]))

    def state_dict(self, weights: Mapping[str, Weight]) -> dict[str, Any]:
        """Return the weights' state, and how many connections each has."""
        return {**super().state_dict(weights), "active": {name: each.num_active for name, each in weights.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Make sure that masks are as they were written."""
        counts = {name: select.count(whole(state["mask"]).bool()) for name, state in state_dict["weights"].items()}
        refuse_other_counts(self.method, state_dict.get("active"), counts)

    def restore(self, weight: Weight, saved: Weight) -> None:  # noqa: D102  (inherited)
        assert isinstance(weight, MaskedWeight)
        assert isinstance(saved, MaskedWeight)
        weight.restore(saved)


def _weight(choice: ParameterChoice) -> MaskedWeight:
    """Return a weight that is active everywhere."""
    if is_sharded(choice.parameter):
        return ShardedWeight(choice.name, choice.parameter, choice.outputs)
    return MaskedWeight(
        choice.name,
        torch.ones_like(choice.parameter, dtype=torch.bool, requires_grad=False),
        choice.parameter,
        outputs=choice.outputs,
        nonempty=choice.nonempty,
    )


def _fits(method: Stored, choice: ParameterChoice, state: Weight) -> bool:
    """Tell whether a parameter is 0 wherever an earlier fit left it inactive, and the method goes on with it."""
    part = _weight(choice).part
    if part != state.part:
        return False
    nonzero, mask = local(choice.parameter).cpu() != 0, state.mask.cpu()
    outside, active, others = part.total(select.count(nonzero & ~mask), select.count(mask), select.count(nonzero))
    return not outside and method.continues(active, others)
