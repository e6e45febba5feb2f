"""Checks of arguments: each error names the argument, the rule, the value got and the remedy."""

import math
import os
from collections.abc import Collection, Sequence

__all__ = ["above", "at_least", "file", "finite", "fraction", "integer", "one_of", "patterns"]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def finite(remedy: str, **argument: float) -> None:
    """Raise unless the one keyword argument is a finite number."""
    ((name, value),) = argument.items()
    if not _is_number(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}. {remedy}")


def above(low: float, remedy: str, **argument: float) -> None:
    """Raise unless the one keyword argument is a finite number above ``low``."""
    ((name, value),) = argument.items()
    if not _is_number(value) or value <= low:
        raise ValueError(f"{name} must be a finite number above {low}, got {value!r}. {remedy}")


def at_least(low: float, remedy: str, **argument: float) -> None:
    """Raise unless the one keyword argument is a finite number of at least ``low``.

    >>> at_least(0, "Try alpha=5e-4.", alpha=-1)
    Traceback (most recent call last):
    ValueError: alpha must be a finite number of at least 0, got -1. Try alpha=5e-4.
    """
    ((name, value),) = argument.items()
    if not _is_number(value) or value < low:
        raise ValueError(f"{name} must be a finite number of at least {low}, got {value!r}. {remedy}")


def file(remedy: str, **argument: str | os.PathLike[str]) -> None:
    """Raise unless the one keyword argument is the path of a file that there is.

    >>> file("Give last.ckpt.", checkpoint="checkpoints")
    Traceback (most recent call last):
    FileNotFoundError: checkpoint must be a file that exists, got 'checkpoints'. Give last.ckpt.
    """
    ((name, value),) = argument.items()
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"{name} must be the path of a file, got one of type {type(value).__name__}. {remedy}")
    if not os.path.isfile(value):
        raise FileNotFoundError(f"{name} must be a file that exists, got {os.fspath(value)!r}. {remedy}")


def fraction(remedy: str, *, above_0: bool = False, below_1: bool = False, **argument: float) -> None:
    """Raise unless the one keyword argument lies in [0, 1], without the ends that are excluded.

    >>> fraction("1 uses all.", above_0=True, share=0)
    Traceback (most recent call last):
    ValueError: share must be above 0, got 0. 1 uses all.
    """
    ((name, value),) = argument.items()
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}. {remedy}")
    if above_0 and value == 0:
        raise ValueError(f"{name} must be above 0, got {value!r}. {remedy}")
    if below_1 and value == 1:
        raise ValueError(f"{name} must be below 1, got {value!r}. {remedy}")


def integer(low: int, remedy: str, **argument: int) -> None:
    """Raise unless the one keyword argument is a whole number of at least ``low``."""
    ((name, value),) = argument.items()
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}. {remedy}")


def one_of(choices: Collection[str], **argument: str) -> None:
    """Raise unless the one keyword argument is among ``choices``."""
    ((name, value),) = argument.items()
    if value not in choices:
        raise ValueError(f"{name} must be one of {sorted(choices)}, got {value!r}.")


def patterns(**argument: Sequence[str] | None) -> list[str] | None:
    """Return the one keyword argument, a list of glob patterns or None, as a list; raise if it is anything else."""
    ((name, value),) = argument.items()
    if value is None:
        return None
    if isinstance(value, str) or not all(isinstance(pattern, str) for pattern in value):
        raise ValueError(f'{name} must be a list of glob patterns such as ["*.head.weight"], got {value!r}.')
    return list(value)
