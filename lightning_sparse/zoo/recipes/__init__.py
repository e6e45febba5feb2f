"""Recipes: YAML files for the rows of the papers' tables.

A *training* is whole: network, data, optimizer and schedule, dense or with a method (``METHOD-NET-DATA``). An
*add-on* puts a method, with a paper's settings, into a training, or changes its data. So a row is one recipe or two:
``PAPER/NET-DATA`` and ``PAPER/METHOD``.
"""

from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

__all__ = ["is_add_on", "names", "path", "summary"]


def _folder() -> Path:
    return Path(str(files(__name__)))


def names() -> list[str]:
    """Return the names of all recipes.

    >>> {"dfbst-lenet300-mnist", "medst/resnet56-cifar10", "medst/rigl"} <= set(names())
    True
    """
    return sorted(file.relative_to(_folder()).with_suffix("").as_posix() for file in _folder().rglob("*.yaml"))


def path(name: str) -> Path:
    """Return the file of a recipe.

    Raises:
        ValueError: there is no such recipe; the message lists near names.

    >>> path("dst-lenet300-minst")
    Traceback (most recent call last):
    ValueError: no recipe is named 'dst-lenet300-minst'. Near: dst-lenet300-mnist, dfbst-lenet300-mnist, ...
    """
    if not isinstance(name, str):
        raise ValueError(f"name must be that of a recipe, got {name!r}. List them all with: lightning-sparse recipes")
    if name not in names():
        near = get_close_matches(name, names(), n=3) or names()
        raise ValueError(
            f"no recipe is named {name!r}. Near: {', '.join(near)}. List them all with: lightning-sparse recipes"
        )
    return _folder() / f"{name}.yaml"


def is_add_on(name: str) -> bool:
    """Tell whether a recipe has no network of its own, so that it needs a training before it.

    >>> is_add_on("medst/rigl"), is_add_on("medst/resnet56-cifar10")
    (True, False)
    """
    return "\nmodel:\n  class_path:" not in path(name).read_text(encoding="utf-8")


def summary(name: str) -> str:
    """Return the first comment line of a recipe."""
    return path(name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
