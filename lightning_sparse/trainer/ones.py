"""What leaves a module when ones enter it, whatever its ``forward`` takes."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_sparse.compat.lightning import isolate_rng
from lightning_sparse.compat.nested import reachable, tensors
from lightning_sparse.trainer.probe import Probe

__all__ = ["EMBEDDINGS", "Way", "ways"]

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class Way(NamedTuple):
    """A way to send ones through a module.

    Attributes:
        name: the call in words.
        inputs: all that enters: ones of double precision, and other tensors.
        call: returns what leaves.
    """

    name: str
    inputs: Any
    call: Callable[[], Any]

    @property
    def has_ones(self) -> bool:
        """Whether any ones enter."""
        return any(x.is_floating_point() for x in reachable(self.inputs))

    @property
    def has_tokens(self) -> bool:
        """Whether integers are among the inputs, for which the ones enter after the embeddings."""
        return any(not x.is_floating_point() for x in reachable(self.inputs))


def ways(probe: Probe) -> Iterator[Way]:
    """Yield the ways to send ones through the copy of a module, the simplest first.

    They are its ``forward`` with ones in place of ``example_input_array``, or with the first tensor of a batch, each
    with one sample, of which integers become 0; and ``training_step`` with a whole batch of any structure, in which
    integers stay as they are. Of the latter the outputs of ``forward`` count, or where it does not call ``self(...)``,
    those of the parts it calls that no other part takes up.
    """
    device, example = probe.trainer.strategy.root_device, probe.module.example_input_array
    if example is not None:
        yield _forward(probe, example, device)
    batch = next(probe.batches(1))
    first = next(tensors(batch), None)
    if first is not None and example is None:
        yield _forward(probe, first, device)
    batch = copy.deepcopy(batch)
    for x in [x for x in reachable(batch) if x.is_floating_point()]:
        x.data = torch.ones_like(x, dtype=torch.float64) if x.layout is torch.strided else x.double()
    name = f"{type(probe.module).__name__}.training_step with a {type(batch).__name__} of ones"
    yield Way(name, batch, partial(_outputs_of_step, probe, batch))


def _forward(probe: Probe, given: Any, device: torch.device) -> Way:
    args = list(given) if isinstance(given, (tuple, list)) else [] if isinstance(given, Mapping) else [given]
    kwargs = dict(given) if isinstance(given, Mapping) else {}
    args = [_filled(x, device) for x in args]
    kwargs = {name: _filled(x, device) for name, x in kwargs.items()}
    shapes = [tuple(x.shape) for x in tensors((args, kwargs))]
    name = f"{type(probe.module).__name__}.forward with inputs of shapes {shapes}"
    return Way(name, (args, kwargs), partial(probe.module, *args, **kwargs))


def _filled(x: Any, device: torch.device) -> Any:
    if not isinstance(x, Tensor):
        return x
    shape = (1, *x.shape[1:])
    if x.is_floating_point():
        return torch.ones(shape, dtype=torch.float64, device=device)
    return torch.zeros(shape, dtype=x.dtype, device=device)


def _outputs_of_step(probe: Probe, batch: Any) -> list[Tensor]:
    """Return what leaves the network within a training step, also if its loss cannot be computed."""
    depth = [0]
    of_forward: list[Tensor] = []
    of_parts: list[Tensor] = []

    def enters(*_: Any) -> None:
        depth[0] += 1

    def leaves(part: nn.Module, args: Any, output: Any) -> None:
        depth[0] -= 1
        found = [x for x in tensors(output) if x.requires_grad]
        if part is probe.module:
            of_forward.extend(found)
        elif not depth[0] and any(True for _ in part.parameters()):  # a loss has none
            of_parts.extend(found)

    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        for part in probe.module.modules():
            stack.enter_context(part.register_forward_pre_hook(enters))
            stack.enter_context(part.register_forward_hook(leaves))
        try:
            probe.step(copy.deepcopy(batch), 0)
        except Exception:
            if not (of_forward or of_parts):
                raise
    return of_forward or _last(of_parts)


def _last(outputs: list[Tensor]) -> list[Tensor]:
    """Return the tensors that none of the others has been computed from."""
    earlier: set[Any] = set()
    pending = [node for x in outputs if x.grad_fn is not None for node, _ in x.grad_fn.next_functions]
    while pending:
        node = pending.pop()
        if node is not None and node not in earlier:
            earlier.add(node)
            pending += [before for before, _ in node.next_functions]
    return [x for x in outputs if x.grad_fn not in earlier]
