"""A recipe as the common ground of a comparison: what it holds beside the sparse callback that methods replace."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from lightning_sparse.trainer.callback import SparseCallback
from lightning_sparse.zoo import recipes

__all__ = ["Arguments", "Recipe"]

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A recipe, of this package or a file of the user's.

    Attributes:
        name: the file's, without its ending.
        file: where it is.
        text: what is in it.
        content: the same, read.
        others: its callbacks that are not sparse, as in the file.
        method: the name of its sparse callback's class, None if it has none.
        arguments: of its sparse callback.
    """

    name: str
    file: Path
    text: str
    content: Mapping[str, Any]
    others: list[Any]
    method: str | None
    arguments: Arguments

    @classmethod
    def read(cls, name: str) -> "Recipe":
        """Read a recipe of the package by its name, or a YAML file by its path.

        Raises:
            ValueError: there is no such recipe, or it is not one that methods can be compared under.
        """
        is_file = Path(name).suffix in (".yaml", ".yml") or Path(name).is_file()
        file = Path(name) if is_file else recipes.path(name)
        if not file.is_file():
            raise ValueError(f"there is no file {name}. Give a YAML file or a name of: lightning-sparse recipes")
        if not is_file and recipes.is_add_on(name):
            raise ValueError(f"{name} is not a training but adds to one. See lightning-sparse recipes.")
        try:
            text = file.read_text(encoding="utf-8")
            content = yaml.safe_load(text)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} is not YAML: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(
                f"{name} is not the configuration of a training: it has no entries such as model and trainer."
            )
        listed = (content.get("trainer") or {}).get("callbacks") or []
        callbacks = listed if isinstance(listed, list) else [listed]
        sparse = [callback for callback in callbacks if _is_sparse(callback)]
        if len(sparse) > 1:
            raise ValueError(
                f"{name} has {len(sparse)} sparse callbacks, but each method takes the place of one. Leave one of them."
            )
        return cls(
            file.stem,
            file.resolve(),
            text,
            content,
            [callback for callback in callbacks if callback not in sparse],
            _class_of(sparse[0]).__name__ if sparse else None,
            _arguments_of(sparse[0]) if sparse else {},
        )

    @property
    def epochs(self) -> int | None:
        """Number of epochs, if it says so."""
        epochs = (self.content.get("trainer") or {}).get("max_epochs")
        return epochs if isinstance(epochs, int) and epochs > 0 else None

    def twin(self, method: str) -> "Recipe | None":
        """Return this package's recipe of a method for the same network and data, None if there is none."""
        name = f"{method.lower()}-{self.name.partition('-')[2]}"
        ours = self.name in recipes.names() and self.file == recipes.path(self.name).resolve()
        return Recipe.read(name) if ours and name in recipes.names() else None

    def differences(self, other: "Recipe") -> dict[str, Any]:
        """Return what ``other`` sets differently, but for callbacks, by dotted key."""
        mine = dict(_flat(self.content))
        return {
            key: value
            for key, value in _flat(other.content)
            if not key.startswith("trainer.callbacks") and mine.get(key) != value
        }


def _class_of(callback: Any) -> type:
    """Import the class of an entry of ``trainer.callbacks``."""
    path = callback if isinstance(callback, str) else callback.get("class_path", "")
    module, _, name = path.rpartition(".")
    try:
        found: type = getattr(import_module(module or "lightning_sparse"), name)
    except (ImportError, AttributeError) as error:
        if not module:
            return object  # a short name of Lightning's own
        raise ValueError(f"the recipe's callback {path!r} cannot be imported: {error}") from error
    return found


def _is_sparse(callback: Any) -> bool:
    found = _class_of(callback)
    return isinstance(found, type) and issubclass(found, SparseCallback)


def _arguments_of(callback: Any) -> Arguments:
    return {} if isinstance(callback, str) else {**callback.get("init_args", {}), **callback.get("dict_kwargs", {})}


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested mappings."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
