"""Files of masks: what one run writes with ``save_masks`` and another begins with."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_sparse.compat import checks
from lightning_sparse.compat.compiled import plain_name
from lightning_sparse.compat.extras import extra
from lightning_sparse.compat.lightning import rank_zero_only

__all__ = ["read_masks", "write_masks"]


@rank_zero_only
def write_masks(masks: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write boolean tensors by parameter name; with several processes, the first one does."""
    plain = {plain_name(name): mask.cpu().contiguous() for name, mask in masks.items()}
    extra("safetensors.torch", "masks").save_file(plain, os.fspath(path))


def read_masks(path: str) -> dict[str, Tensor]:
    """Return the boolean tensors of a file, by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or holds other tensors, or other bytes than 0 and 1.
    """
    checks.file("Give a file that callback.save_masks has written.", initial=path)
    safetensors = extra("safetensors", "masks")
    try:
        masks: dict[str, Tensor] = extra("safetensors.torch", "masks").load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"initial must be a file of masks, got {path!r}, which is not in the format safetensors ({error}). "
            "callback.save_masks(path) writes one."
        ) from error
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ValueError(
                f"initial must be a file of boolean masks, got {path!r}, whose {name!r} is of {mask.dtype}. "
                "callback.save_masks(path) writes one; of weights, write {name: weight != 0}."
            )
        if mask.numel() and int(mask.view(torch.uint8).max()) > 1:
            raise ValueError(
                f"initial must be a file of boolean masks, got {path!r}, whose {name!r} holds other bytes than 0 and "
                "1: the file is broken. callback.save_masks(path) writes one."
            )
    return masks
