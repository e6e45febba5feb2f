"""Which weights stand before a batch norm that has seen training batches: a sign that they are trained."""

from collections.abc import Mapping

from torch import nn

from lightning_sparse.compat.torch_private import RunningNorm

__all__ = ["behind_seen_norms"]

_BATCHES = 10  # more than examples that a module sends through itself to find shapes


def behind_seen_norms(module: nn.Module, outputs: Mapping[str, int]) -> set[str]:
    """Return the names of weights that may belong to a batch norm with the statistics of a training.

    These are the weights in the same part of the module with as many outputs as the norm has features. Norms that are
    frozen do not count: what comes after a frozen network may be new.

    Args:
        module: that has the weights.
        outputs: the number of outputs of each weight by name.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv1d(1, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(8, 2, 3))
    >>> outputs = {name: len(p) for name, p in net.named_parameters() if p.ndim == 3}
    >>> before = behind_seen_norms(net, outputs)
    >>> for _ in range(10):
    ...     _ = net(torch.randn(4, 1, 9))
    >>> before, behind_seen_norms(net, outputs)
    (set(), {'0.weight'})
    """
    found = set()
    for name, norm in module.named_modules():
        if isinstance(norm, RunningNorm) and _has_seen(norm):
            part = name.rpartition(".")[0]
            prefix = f"{part}." if part else ""
            found |= {n for n, number in outputs.items() if n.startswith(prefix) and number == norm.num_features}
    return found


def _has_seen(norm: RunningNorm) -> bool:
    """Tell whether the statistics are of many batches, or were brought from elsewhere."""
    frozen = any(not parameter.requires_grad for parameter in norm.parameters())
    if frozen or norm.running_mean is None or norm.num_batches_tracked is None:
        return False
    batches = int(norm.num_batches_tracked)
    return batches >= _BATCHES or (batches == 0 and bool(norm.running_mean.any()))
