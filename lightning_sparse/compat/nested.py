"""The tensors within what a batch holds, a network returns or an optimizer keeps."""

import dataclasses
from collections.abc import Iterator, Mapping
from types import ModuleType

from torch import Tensor, nn

__all__ = ["reachable", "tensors"]


def tensors(thing: object) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and mappings, in order; nothing of other things."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (list, tuple, Mapping)):
        for part in thing.values() if isinstance(thing, Mapping) else thing:
            yield from tensors(part)


def reachable(thing: object) -> Iterator[Tensor]:
    """Yield each tensor once that ``thing`` holds: as ``tensors``, and in attributes of any objects, as graphs have.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> graph = SimpleNamespace(x=torch.zeros(2), store={"edges": torch.ones(1)}, name="a graph")
    >>> [x.shape[0] for x in reachable([graph, graph])]
    [2, 1]
    """
    yield from _reachable(thing, set(), 10)


def _reachable(thing: object, seen: set[int], depth: int) -> Iterator[Tensor]:
    if depth == 0 or id(thing) in seen or isinstance(thing, (type, ModuleType, nn.Module, str, bytes, int, float)):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        return
    parts: list[object] = []
    if isinstance(thing, Mapping):
        parts += thing.values()
    elif isinstance(thing, (list, tuple, set)):
        parts += thing
    parts += vars(thing).values() if hasattr(thing, "__dict__") else ()
    if dataclasses.is_dataclass(thing):  # it may have slots
        parts += [getattr(thing, field.name, None) for field in dataclasses.fields(thing)]
    for part in parts:
        yield from _reachable(part, seen, depth - 1)
