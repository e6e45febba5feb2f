"""The tensors within what a batch holds, a network returns or an optimizer keeps."""

from collections.abc import Iterator, Mapping

from torch import Tensor

__all__ = ["tensors"]


def tensors(thing: object) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and mappings, in order; nothing of other things."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (list, tuple, Mapping)):
        for part in thing.values() if isinstance(thing, Mapping) else thing:
            yield from tensors(part)
