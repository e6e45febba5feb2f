"""Recipes: one YAML file per row of the papers' tables, named ``METHOD-NET-DATA``."""

from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

__all__ = ["names", "path", "summary"]


def _folder() -> Path:
    return Path(str(files(__name__)))


def names() -> list[str]:
    """Return the names of all recipes.

    >>> "dfbst-lenet300-mnist" in names()
    True
    """
    return sorted(file.stem for file in _folder().glob("*.yaml"))


def path(name: str) -> Path:
    """Return the file of a recipe.

    Raises:
        ValueError: there is no such recipe; the message lists near names.

    >>> path("dst-lenet300-minst")
    Traceback (most recent call last):
    ValueError: no recipe is named 'dst-lenet300-minst'. Near: dst-lenet300-mnist, dfbst-lenet300-mnist, ...
    """
    if name not in names():
        near = get_close_matches(name, names(), n=3) or names()
        raise ValueError(
            f"no recipe is named {name!r}. Near: {', '.join(near)}. List them all with: lightning-sparse recipes"
        )
    return _folder() / f"{name}.yaml"


def summary(name: str) -> str:
    """Return the first comment line of a recipe."""
    return path(name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
