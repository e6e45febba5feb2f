"""Checks of arguments: each error names the argument, the rule, the value got and the remedy."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import nn

__all__ = [
    "above",
    "at_least",
    "did_you_mean",
    "file",
    "finite",
    "flag",
    "folder_of",
    "fraction",
    "integer",
    "is_number",
    "module",
    "one_of",
    "pair",
    "path",
    "patterns",
    "seed",
    "text",
    "vector",
]

_LARGEST = 3.4028234663852886e38  # of float32
_INT64 = 2**63 - 1


def is_number(value: object) -> bool:
    """Tell whether ``value`` is a real number that is finite in float32, too."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _got(value: object) -> str:
    """Describe a value: a number that is too large, or anything else without filling the screen."""
    if isinstance(value, (int, float)) and _LARGEST < abs(value) < float("inf"):
        return f"{value:.3g}, which is infinite in float32" if isinstance(value, float) else "one of 39 digits or more"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def finite(remedy: str, **argument: float) -> None:
    """Raise unless the one keyword argument is a finite number."""
    ((name, value),) = argument.items()
    if not is_number(value):
        raise ValueError(f"{name} must be a finite number, got {_got(value)}. {remedy}")


def above(low: float, remedy: str, **argument: float) -> None:
    """Raise unless the one keyword argument is a finite number above ``low``."""
    ((name, value),) = argument.items()
    if not is_number(value) or value <= low:
        raise ValueError(f"{name} must be a finite number above {low}, got {_got(value)}. {remedy}")


def at_least(low: float, remedy: str, **argument: float) -> None:
    """Raise unless the one keyword argument is a finite number of at least ``low``.

    >>> at_least(0, "Try alpha=5e-4.", alpha=-1)
    Traceback (most recent call last):
    ValueError: alpha must be a finite number of at least 0, got -1. Try alpha=5e-4.
    """
    ((name, value),) = argument.items()
    if not is_number(value) or value < low:
        raise ValueError(f"{name} must be a finite number of at least {low}, got {_got(value)}. {remedy}")


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
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, got {_got(value)}. {remedy}")
    if above_0 and value == 0:
        raise ValueError(f"{name} must be above 0, got {value!r}. {remedy}")
    if below_1 and value == 1:
        raise ValueError(f"{name} must be below 1, got {value!r}. {remedy}")


def integer(low: int, remedy: str, *, high: int = _INT64, **argument: int) -> None:
    """Raise unless the one keyword argument is a whole number of at least ``low`` and at most ``high``."""
    ((name, value),) = argument.items()
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {_got(value)}. {remedy}")
    if value > high:
        raise ValueError(f"{name} must be an integer of at most {high}, got {_got(value)}. {remedy}")


def seed(remedy: str, **argument: int) -> None:
    """Raise unless the one keyword argument is what a random generator can be seeded with."""
    integer(0, remedy, high=2**64 - 1, **argument)


def flag(**argument: bool) -> None:
    """Raise unless the one keyword argument is True or False.

    >>> flag(bias="no")
    Traceback (most recent call last):
    ValueError: bias must be True or False, got 'no'.
    """
    ((name, value),) = argument.items()
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {_got(value)}.")


def text(remedy: str, **argument: str) -> None:
    """Raise unless the one keyword argument is a string that is not empty."""
    ((name, value),) = argument.items()
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a string that is not empty, got {_got(value)}. {remedy}")


def vector(remedy: str, **argument: Sequence[float]) -> None:
    """Raise unless the one keyword argument is a list or tuple of finite numbers."""
    ((name, value),) = argument.items()
    if not isinstance(value, (list, tuple)) or not all(map(is_number, value)):
        raise ValueError(f"{name} must be a list of finite numbers, got {_got(value)}. {remedy}")


def pair(low: int, remedy: str, **argument: int | Sequence[int]) -> None:
    """Raise unless the one keyword argument is a whole number of at least ``low``, or a list or tuple of two.

    >>> pair(1, "3 is usual.", kernel_size="3")
    Traceback (most recent call last):
    ValueError: kernel_size must be an integer of at least 1, or a pair of them, got '3'. 3 is usual.
    """
    ((name, value),) = argument.items()
    both = value if isinstance(value, (list, tuple)) else (value, value)
    if len(both) != 2 or not all(type(n) is int and low <= n <= _INT64 for n in both):
        raise ValueError(f"{name} must be an integer of at least {low}, or a pair of them, got {_got(value)}. {remedy}")


def module(**argument: nn.Module) -> None:
    """Raise unless the one keyword argument is a module."""
    ((name, value),) = argument.items()
    if not isinstance(value, nn.Module):
        raise ValueError(
            f"{name} must be an nn.Module, got one of type {type(value).__name__}. For a checkpoint, give "
            "MyModule.load_from_checkpoint(path)."
        )


def path(remedy: str, **argument: str | os.PathLike[str]) -> None:
    """Raise unless the one keyword argument may be the path of something."""
    ((name, value),) = argument.items()
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"{name} must be a path, got {_got(value)}. {remedy}")


def folder_of(**argument: str | os.PathLike[str]) -> None:
    """Raise unless the one keyword argument is the path of a file that can be written: its folder is there.

    >>> folder_of(path="nowhere/net.onnx")
    Traceback (most recent call last):
    FileNotFoundError: path must be in a folder that exists, got 'nowhere/net.onnx'. Make the folder first.
    """
    ((name, value),) = argument.items()
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ValueError(f"{name} must be the path of a file, got {_got(value)}. Give one such as 'net.file'.")
    given = os.fspath(value)
    if os.path.isdir(given):
        raise ValueError(f"{name} must be the path of a file, got the folder {given!r}. Add the name of a file.")
    if not os.path.isdir(os.path.dirname(given) or os.curdir):
        raise FileNotFoundError(f"{name} must be in a folder that exists, got {given!r}. Make the folder first.")


def one_of(choices: Collection[str], **argument: str) -> None:
    """Raise unless the one keyword argument is among ``choices``."""
    ((name, value),) = argument.items()
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {sorted(choices)}, got {_got(value)}.")


def patterns(**argument: Sequence[str] | None) -> list[str] | None:
    """Return the one keyword argument, a list of glob patterns or None, as a list; raise if it is anything else."""
    ((name, value),) = argument.items()
    if value is None:
        return None
    listed: Any = value
    good = isinstance(listed, Collection) and not isinstance(listed, (str, bytes, Mapping))
    if not good or not all(isinstance(pattern, str) for pattern in listed):
        raise ValueError(f'{name} must be a list of glob patterns such as ["*.head.weight"], got {_got(value)}.')
    return list(value)


def did_you_mean(pattern: str, names: Iterable[str]) -> str:
    """Return a question that ends in a blank: the nearest glob pattern that matches one of the dotted ``names``.

    >>> did_you_mean("enocder.*", ["encoder.fc.weight", "head.weight"])
    "Did you mean 'encoder.*'? "
    """
    matching: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        matching |= dict.fromkeys([name, *(".".join([*parts[:i], "*"]) for i in range(1, len(parts)))])
        matching |= dict.fromkeys(".".join(["*", *parts[i:]]) for i in range(1, len(parts)))
    return "".join(f"Did you mean {near!r}? " for near in get_close_matches(pattern, matching, n=1))
