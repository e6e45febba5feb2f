"""2:4 sparsity: two zeros in every four neighbours of a row, which recent NVIDIA GPUs multiply faster."""

import copy

import torch
from torch import Tensor, nn

from lightning_sparse.export._modules import check_dense
from lightning_sparse.kernels.semi_structured import CAPABILITY, DTYPES, size_fits

__all__ = ["fits_2_4", "to_semi_structured"]


def fits_2_4(weight: Tensor) -> bool:
    """Return whether every four neighbours along the last dimension of ``(out, in)`` hold at most two nonzeros.

    >>> fits_2_4(torch.tensor([[1.0, 0.0, 2.0, 0.0]])), fits_2_4(torch.tensor([[1.0, 2.0, 3.0, 0.0]]))
    (True, False)
    """
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).reshape(-1, 4).sum(1) <= 2).all())


def to_semi_structured(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` for inference whose linear layers of 2:4 pattern use the GPU's sparse tensor cores.

    Layers of another pattern stay dense, as do those of sizes that torch's kernels do not take (out a multiple of 32,
    in of 64). Methods with masks make the pattern with ``pattern="2:4"``. ``module`` is not changed.

    Args:
        module: on a CUDA device of compute capability 8.0 or more, in float16 or bfloat16.

    Raises:
        ValueError: no linear layer has the pattern, or the module has sparse layers.
        RuntimeError: there is no CUDA device, or the module is not on one that can do it, or in another dtype.

    Example:
        >>> from torch import nn
        >>> from lightning_sparse.export import to_semi_structured
        >>> fast = to_semi_structured(nn.Linear(64, 32).cuda().half())  # doctest: +SKIP
    """
    check_dense(module, "to_semi_structured")
    layers = {name: layer for name, layer in module.named_modules() if type(layer) is nn.Linear}
    weights = {name: layer.weight for name, layer in layers.items()}
    chosen = {name: weight for name, weight in weights.items() if fits_2_4(weight) and size_fits(weight.shape)}
    if not chosen:
        raise ValueError(
            f"None of the {len(layers)} Linear layers has the 2:4 pattern (at most two nonzeros in every four "
            "neighbours of a row; out a multiple of 32, in of 64). Unstructured sparsity does not fit it: use to_csr, "
            "compact or save_sparse."
        )
    if not torch.cuda.is_available():
        raise RuntimeError("2:4 sparsity needs a CUDA device, and torch sees none. On CPU use to_csr or compact.")
    for name, weight in chosen.items():
        if weight.device.type != "cuda" or weight.dtype not in DTYPES:
            raise RuntimeError(
                f"2:4 sparsity needs weights on CUDA in float16 or bfloat16, but {name}.weight is {weight.dtype} on "
                f"{weight.device}. Call module.cuda().half() first."
            )
        if torch.cuda.get_device_capability(weight.device) < CAPABILITY:
            raise RuntimeError("2:4 sparsity needs a GPU of compute capability 8.0 or more.")
    result = copy.deepcopy(module).eval()
    for name in chosen:
        layer = result.get_submodule(name)
        sparse = torch.sparse.to_sparse_semi_structured(layer.weight.detach())  # type: ignore[operator,union-attr]
        layer.weight = nn.Parameter(sparse, requires_grad=False)
    return result
