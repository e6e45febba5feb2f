"""Boolean matrices kept eight elements to a byte, each row by itself: element j is bit ``j % 8`` of byte ``j // 8``."""

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["GATHER", "INTEGERS", "pack", "unpack"]

#: by the number of their bytes
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: times eight bytes that are 0 or 1, read as one little-endian integer: their bits stand in its highest byte
GATHER = 0x0102040810204080


def pack(mask: Tensor) -> Tensor:
    """Return ``mask (out, n)``, boolean or of ones and zeros, as bytes ``(out, ceil(n / 8))``."""
    if not mask.numel():
        return torch.empty(len(mask), -(-mask.shape[1] // 8), dtype=torch.uint8, device=mask.device)
    flags = mask.bool().contiguous().view(torch.uint8)
    if mask.shape[1] % 8:
        flags = pad(flags, (0, -mask.shape[1] % 8))
    return flags.view(torch.int64).mul(GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack(bits: Tensor, n: int) -> Tensor:
    """Return the boolean matrix ``(out, n)`` that was packed into ``bits``."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return bits.unsqueeze(2).bitwise_right_shift(places).bitwise_and_(1).bool().flatten(1)[:, :n]
