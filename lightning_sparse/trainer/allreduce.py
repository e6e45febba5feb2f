"""MaskedAllreduce: DDP sends the gradients of connections alone, where those of all weights are not needed."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn

from lightning_sparse.compat.lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    is_a,
    rank_zero_info,
)
from lightning_sparse.trainer.verbs import Verbs

__all__ = ["MaskedAllreduce"]


class MaskedAllreduce(Callback):
    """Processes exchange the gradients of connections alone, in the steps that need no others.

    It stands in the Trainer beside methods with masks. All processes have the same masks, so no positions are sent:
    the message of a step shrinks to the density of the weights, and the other parameters. Where connections are about
    to move, and with methods that look at the gradients of all weights at each step (SNFS, and those with latent
    weights), the whole gradients are sent as ever; the log says which methods these are. What is trained does not
    change; sums of three and more processes may be added up in another order.

    Attributes:
        elements: number of gradients that the latest step has sent.

    Raises:
        MisconfigurationException: at the start of training, if DDP has a communication hook of its own, or there is
            no method of this package in the Trainer.

    Example:
        >>> from lightning_sparse import MaskedAllreduce, RigL
        >>> callbacks = [RigL(sparsity=0.9), MaskedAllreduce()]  # Trainer(strategy="ddp", callbacks=callbacks)
    """

    def __init__(self) -> None:
        self.elements = 0
        self._weights: dict[int, tuple[Verbs, str]] = {}  # by the parameter: whose, and its name

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have DDP send what the methods need."""
        methods: list[Any] = [each for each in trainer.callbacks if isinstance(each, Verbs)]  # type: ignore[attr-defined]
        if not methods:
            raise MisconfigurationException(
                "MaskedAllreduce sends the gradients that a sparse method needs, but the Trainer has none. Add one "
                "such as RigL(sparsity=0.9) to callbacks, or take MaskedAllreduce away."
            )
        self._weights = {
            id(weight.parameter): (method, name)
            for method in methods
            for name, weight in method._weights.items()
            if weight.parameter.shape == weight.shape  # not a vector of nonzeros, all of which are sent
        }
        whole = [repr(method) for method in methods if method.needs_whole_gradients]
        if whole:
            rank_zero_info(f"MaskedAllreduce: {', '.join(whole)} needs the gradients of all weights at each step.")
        if is_a(trainer.strategy, "DDPStrategy") and len(whole) < len(methods):
            self._register(trainer.strategy.model)

    def _register(self, model: Any) -> None:
        try:
            # DDP takes no annotation but its own GradBucket, which not every build of torch has
            model.register_comm_hook(model.process_group, lambda group, bucket: self._exchange(group, bucket))
        except RuntimeError as error:
            raise MisconfigurationException(
                f"MaskedAllreduce needs the communication hook of DDP, which has one already ({error}). Leave out "
                "ddp_comm_hook of the strategy, or MaskedAllreduce."
            ) from error

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count anew."""
        self.elements = 0

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the methods."""
        self._weights = {}

    def _exchange(self, group: Any, bucket: Any) -> torch.futures.Future[Tensor]:
        """Average a bucket of gradients over the processes; what is not sent becomes 0."""
        parts = [*self._parts(bucket)]
        sent = [x if at is None else x[at] for x, at in parts]
        flat = torch.cat(sent).mul_(1 / distributed.get_world_size(group))  # before the sum, which may overflow
        self.elements += len(flat)

        def write(done: torch.futures.Future[list[Tensor]]) -> Tensor:
            means = torch.split(done.value()[0], [len(x) for x in sent])
            for (x, at), mean in zip(parts, means, strict=True):
                if at is None:
                    x.copy_(mean)
                else:
                    x.zero_()[at] = mean
            buffer: Tensor = bucket.buffer()
            return buffer

        work = distributed.all_reduce(flat, group=group, async_op=True)
        assert work is not None
        return work.get_future().then(write)

    def _parts(self, bucket: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the gradients of a bucket as vectors, and which of their elements are sent; None: all."""
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            yield gradient.view(-1), self._positions(parameter)

    def _positions(self, parameter: nn.Parameter) -> Tensor | None:
        method, name = self._weights.get(id(parameter), (None, ""))
        return None if method is None else method.gradient_positions(name)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy without the methods."""
        return {**vars(self), "_weights": {}}
