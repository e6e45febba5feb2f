"""Memory: bytes of training's tensors as they are stored, and of this process as the operating system counts it."""

import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.compat.nested import tensors
from lightning_sparse.compat.shards import local

__all__ = ["peak_memory", "resident_memory", "stored_bytes"]


def stored_bytes(module: nn.Module, optimizers: Sequence[Optimizer], method: object = None) -> dict[str, int]:
    """Return the bytes of training's tensors as they are stored, each memory counted once.

    Of tensors that processes share, those of the part that is here count.

    Args:
        module: the one that is trained, dense or with sparse layers.
        optimizers: of its parameters.
        method: what else holds tensors: lists and dictionaries, nested, such as ``SparseCallback.state_tensors``.

    Returns:
        ``weights``: of all parameters; ``buffers``: the module's, with the indices of sparse layers; ``gradients``:
        of the parameters that train, whether they are allocated now or not; ``optimizer_state``; ``method``: masks,
        latent weights and the like.

    >>> import torch
    >>> net = nn.Linear(3, 2)
    >>> stored_bytes(net, [torch.optim.SGD(net.parameters(), lr=0.1)])
    {'weights': 32, 'buffers': 0, 'gradients': 32, 'optimizer_state': 0, 'method': 0}
    """
    seen: set[int] = set()
    parameters = list(module.parameters())
    weights = _new_bytes(parameters, seen)
    buffers = _new_bytes(list(module.buffers()), seen)
    gradients = sum(local(p).nbytes for p in parameters if p.requires_grad)
    seen.update(_storage(p.grad) for p in parameters if p.grad is not None)
    state = _new_bytes([optimizer.state for optimizer in optimizers], seen)
    return {
        "weights": weights,
        "buffers": buffers,
        "gradients": gradients,
        "optimizer_state": state,
        "method": _new_bytes(method, seen),
    }


def _storage(tensor: Tensor) -> int:
    return local(tensor).untyped_storage().data_ptr()


def _new_bytes(thing: object, seen: set[int]) -> int:
    """Return the bytes of the tensors within ``thing`` whose memory is not in ``seen``, and add it there."""
    total = 0
    for tensor in tensors(thing):
        if _storage(tensor) not in seen:
            seen.add(_storage(tensor))
            total += local(tensor).untyped_storage().nbytes()
    return total


def _linux(entry: str) -> float | None:
    """Return an entry of the kernel's account of this process in bytes, None on other systems.

    Unlike ``ru_maxrss`` it does not begin with the memory of the process that started this one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * float(status.split(f"{entry}:")[1].split()[0])
    except (OSError, IndexError):
        return None


def peak_memory() -> float:
    """Return the largest resident memory of this process so far, in bytes; NaN where the system does not tell."""
    peak = _linux("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ModuleNotFoundError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def resident_memory() -> float:
    """Return the resident memory of this process now, in bytes; where only the peak is known, the peak."""
    now = _linux("VmRSS")
    return peak_memory() if now is None else now
