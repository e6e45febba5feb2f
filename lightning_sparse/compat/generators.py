"""OwnGenerator: a random generator that can be pickled and copied where it is."""

from typing import Any

import torch

__all__ = ["OwnGenerator"]


class OwnGenerator(torch.Generator):
    """A generator on the CPU; a copy, or what is read from a pickle, goes on where this one is.

    Its state is pickled as bytes, since a passing tensor does not reach a spawned process.
    """

    def __reduce__(self) -> Any:
        """Pickle and copy the state."""
        return _at, (bytes(self.get_state().tolist()),)


def _at(state: bytes) -> OwnGenerator:
    """Return a generator with this state."""
    generator = OwnGenerator()
    generator.set_state(torch.tensor(list(state), dtype=torch.uint8))
    return generator
