"""How a convolution reads its input, and convolving by a product with the unfolded input."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Geometry", "convolve"]

# elements of unfolded input at once, if one image has not more: on the CPU those still in the cache when they are
# multiplied; a GPU idles over so few
_CHUNK, _GPU_CHUNK = 1 << 19, 1 << 24

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """How a convolution reads its input."""

    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    def outputs(self, space: Sequence[int]) -> Pair:
        """Return height and width of the output.

        Raises:
            RuntimeError: the kernel is larger than the padded input.
        """
        height, width = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in zip(space, *self, strict=True)
        )
        if min(height, width) < 1:
            raise RuntimeError(f"The kernel is larger than the padded input of {tuple(space)}: {self}.")
        return height, width

    def unfold(self, x: Tensor) -> Tensor:
        """Return what each output reads as a column, ``(channels * places, images * outputs)``."""
        height, width = self.outputs(x.shape[2:])
        vertical, horizontal = self.padding
        if vertical or horizontal:
            x = functional.pad(x, (horizontal, horizontal, vertical, vertical))
        image, channel, *steps = x.stride()
        within = [step * d for step, d in zip(steps, self.dilation, strict=True)]
        between = [step * s for step, s in zip(steps, self.stride, strict=True)]
        # a view, so that one copy is enough: torch's unfold puts the images first, and to turn that takes another
        sizes = x.shape[1], *self.kernel_size, len(x), height, width
        windows = x.as_strided(sizes, (channel, *within, image, *between))
        return windows.reshape(math.prod(sizes[:3]), math.prod(sizes[3:])).contiguous()

    def fold(self, columns: Tensor, images: int, space: Sequence[int]) -> Tensor:
        """Add up what ``unfold`` has spread."""
        columns = columns.view(len(columns), images, -1).transpose(0, 1)
        if self.reads_one:
            return columns.reshape(images, columns.shape[1], *space)
        return functional.fold(
            columns, (space[0], space[1]), self.kernel_size, self.dilation, self.padding, self.stride
        )

    @property
    def reads_one(self) -> bool:
        """The output at a place is that of the input there: 1 x 1, stride 1, no padding."""
        return self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0)

    def unfolded(self, x: Tensor) -> int:
        """Return how many elements one image has when it is unfolded."""
        return x.shape[1] * math.prod(self.kernel_size) * math.prod(self.outputs(x.shape[2:]))

    def chunks(self, x: Tensor) -> Iterator[slice]:
        """Yield as many images at a time as may be unfolded at once."""
        at_once = max(1, (_CHUNK if x.is_cpu else _GPU_CHUNK) // max(1, self.unfolded(x)))
        for first in range(0, len(x), at_once):
            yield slice(first, first + at_once)


def convolve(
    x: Tensor, out: int, geometry: Geometry, product: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Tensor:
    """Return the convolution of ``x`` by a product, for which it is unfolded for some images at a time.

    Args:
        x: ``(batch, in, height, width)``.
        out: channels of the result.
        geometry: how ``x`` is read.
        product: gives the weight times a matrix of ``in * places`` rows: ``(out, n)``.
        dtype: of what is multiplied and of the result.
    """
    y = x.new_empty(len(x), out, *geometry.outputs(x.shape[2:]), dtype=dtype)
    for images in geometry.chunks(x):
        part = product(geometry.unfold(x[images].to(dtype)))
        y[images] = part.view(out, -1, *y.shape[2:]).transpose(0, 1)
    return y
