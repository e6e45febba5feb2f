"""What is compared: methods as they are written on the command line, with all of their arguments."""

import hashlib
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import yaml

import lightning_sparse
from lightning_sparse.compare.recipe import Arguments, Recipe
from lightning_sparse.compat import checks
from lightning_sparse.trainer.callback import SparseCallback

__all__ = ["SYNTAX", "Entry", "check_option", "entries", "folder_name", "methods"]

SYNTAX = "NAME or NAME:ARGUMENT=VALUE:ARGUMENT=VALUE, such as rigl:update_every=50:drop_fraction=0.2"

#: the sparsity of methods that need one, if none is given
SPARSITY = 0.9

#: required arguments that follow from the sparsity unless they are given
DERIVED: dict[str, dict[str, Callable[[float], Any]]] = {
    "TopKAST": {"backward_sparsity": lambda sparsity: max(0.0, round(1 - 2 * (1 - sparsity), 6))},
}


@dataclass(frozen=True)
class Entry:
    """One row of the table: a method with all of its arguments.

    Attributes:
        method: the class's name, or "dense".
        title: the method and what tells it from others, but for its sparsity: the rows of one curve share it.
        sparsity: the sparsity it was given; None for dense and for methods that find a density of their own.
        arguments: of the callback.
        options: of ``lightning-sparse fit``, as ``KEY=VALUE``.
    """

    method: str
    title: str
    sparsity: float | None = None
    arguments: Arguments = field(default_factory=dict)
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name the entry in one line.

        >>> Entry("RigL", "RigL update_every=50", 0.9).name
        'RigL update_every=50 at sparsity 0.9'
        """
        return self.title if self.sparsity is None else f"{self.title} at sparsity {self.sparsity:g}"

    @property
    def key(self) -> str:
        """Return what tells the entry from every other one, for the name of its folder.

        >>> Entry("RigL", "RigL", 0.9, {"sparsity": 0.9, "update_every": 50}).key
        'RigL,sparsity=0.9,update_every=50'
        """
        return ",".join([self.method, *(f"{name}={value}" for name, value in self.arguments.items()), *self.options])


def folder_name(key: str) -> str:
    """Return a name that every file system takes, different for different keys.

    >>> folder_name("RigL,sparsity=0.9"), folder_name("DST,alpha=0.1,exclude=['*.head.weight']")
    ('RigL,sparsity=0.9', 'DST,alpha=0.1,exclude=___.head.weight__-5f308392')
    """
    plain = re.sub(r"[^\w.,=+-]", "_", key)[:120]
    return plain if plain == key else f"{plain}-{hashlib.sha1(key.encode()).hexdigest()[:8]}"


#: what compare sets of the Trainer, and what to give in its place
_OURS = {
    "callbacks": "Give --methods instead.",
    "logger": "Leave it out.",
    "max_epochs": "Give --epochs instead.",
    "default_root_dir": "Give --out instead.",
    "enable_progress_bar": "Leave it out.",
}


def check_option(option: str) -> None:
    """Raise unless ``--KEY=VALUE`` is an option of fit that every run may have.

    >>> check_option("--data.init_args.batch_size=32")
    >>> check_option("--trainer.logger=false")
    Traceback (most recent call last):
    ValueError: --trainer.logger is set by compare itself. Leave it out.
    """
    key, equals, _ = option.partition("=")
    if not equals or not key.startswith(("--trainer.", "--model.", "--data.")):
        raise ValueError(
            f"{option} is not an option of compare. Options for all runs have the form --trainer.KEY=VALUE, "
            "--model.KEY=VALUE or --data.KEY=VALUE, with the equals sign."
        )
    remedy = _OURS.get(key.split(".")[1].rstrip("+"))
    if remedy:
        raise ValueError(f"{key} is set by compare itself. {remedy}")


def methods() -> dict[str, type[SparseCallback]]:
    """Return the methods of this package by name; a second name, such as GSE, stands for the same class.

    >>> "RigL" in methods(), "SparseCallback" in methods()
    (True, False)
    """
    found = {name: getattr(lightning_sparse, name) for name in lightning_sparse.__all__}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, type) and issubclass(value, SparseCallback) and not inspect.isabstract(value)
    }


def entries(
    text: str, sparsities: Sequence[float] | None, recipe: Recipe, note: Callable[[str], None] = lambda line: None
) -> list[Entry]:
    """Return what ``--methods`` names, one entry for each method and sparsity.

    A method's arguments are, the first that there is: those written; those of the recipe, if it is the method's; those
    of the method's recipe in this package for the same network and data. The recipe's choice of layers holds for all.

    Args:
        text: methods separated by commas, each ``NAME:ARGUMENT=VALUE:...``; upper and lower case are alike. Values are
            YAML; brackets and quotes protect commas and colons. An argument with a dot is an option of
            ``lightning-sparse fit``.
        sparsities: of the methods that take ``sparsity`` and were not given one; None: the recipe's, else 0.9. Methods
            with thresholds find a density of their own where the recipe or ``text`` has what drives them to it.
        recipe: the one that all run under.
        note: is told where arguments come from that were not written.

    Raises:
        ValueError: a method or argument is unknown, missing or out of range, or an entry comes twice.
    """
    found = [entry for part in _split(text, ",") for entry in _entries(part, sparsities, recipe, note)]
    seen: set[str] = set()
    for entry in found:
        if entry.key in seen:
            raise ValueError(f"{entry.name} comes twice. Leave one of them.")
        seen.add(entry.key)
    return found


def _entries(
    text: str, sparsities: Sequence[float] | None, recipe: Recipe, note: Callable[[str], None]
) -> Iterator[Entry]:
    """Yield the entries of one method."""
    name, given, options = _parse(text)
    kind = _find(name)
    if kind is None:
        if given:
            raise ValueError(f"dense takes no arguments, got {', '.join(given)} in {text!r}.")
        yield Entry("dense", " ".join(["dense", *options]), options=options)
        return
    method = kind.__name__
    instead = [_instead(kind)] if "sparsity" in given else []  # what the sparsity takes the place of
    written = {*given, *instead, *(option.partition("=")[0] for option in options)}
    defaults = _defaults(method, written, recipe, note)
    arguments = {**{key: value for key, value in defaults.items() if key not in instead}, **given}
    layers = {k: v for k, v in recipe.arguments.items() if k in ("include", "exclude") and k not in arguments}
    silent = {"sparsity", "include", "exclude"} - (given.keys() - {"sparsity"})
    shown = [f"{key}={value}" for key, value in arguments.items() if key not in silent]
    title = " ".join([method, *shown, *options])
    if _finds_density(kind, arguments):
        _check(kind, text, arguments | layers)
        yield Entry(method, title, None, arguments | layers, options)
        return
    own = [arguments["sparsity"]] if "sparsity" in arguments else [SPARSITY]
    for sparsity in own if sparsities is None or "sparsity" in given else sparsities:
        checks.fraction("It is the share of zeros, 0.9 for 10 % of the weights.", sparsity=sparsity)
        derived = {key: rule(sparsity) for key, rule in DERIVED.get(method, {}).items()}
        whole = {**derived, **arguments, **layers, "sparsity": sparsity}
        _check(kind, text, whole)
        yield Entry(method, title, float(sparsity), whole, options)


def _instead(kind: type[SparseCallback]) -> str:
    """Return the argument that a method may be given in place of ``sparsity``, "" if there is none."""
    return getattr(kind, "instead_of_sparsity", None) or ""


def _finds_density(kind: type[SparseCallback], arguments: Arguments) -> bool:
    """Tell whether a method with these arguments comes to a density of its own."""
    parameter = inspect.signature(kind).parameters.get("sparsity")
    if parameter is None:
        return True
    if parameter.default is parameter.empty or arguments.get("sparsity") is not None:
        return False
    return not getattr(kind, "needs_one", False) or arguments.get(_instead(kind)) is not None


def _parse(text: str) -> tuple[str, Arguments, tuple[str, ...]]:
    """Split ``NAME:ARGUMENT=VALUE:...`` into name, arguments of the callback, and options of fit."""
    name, *settings = _split(text, ":")
    arguments: Arguments = {}
    options: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals and value):
            raise ValueError(f"{text!r}: {setting!r} is not ARGUMENT=VALUE. Write {SYNTAX}.")
        if key in arguments or key in options:
            raise ValueError(f"{text!r} gives {key} twice. Leave one of them.")
        if "." in key:
            check_option(f"--{setting}")
            options[key] = value
        else:
            arguments[key] = _value(value)
    return name.strip(), arguments, tuple(f"{key}={value}" for key, value in options.items())


def _split(text: str, separator: str) -> list[str]:
    """Split at a character that is in no brackets and no quotes.

    >>> _split("rigl:exclude=['a:b',c]:decay=none", ":")
    ['rigl', "exclude=['a:b',c]", 'decay=none']
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote or character in "'\"":
            quote = character if not quote else "" if character == quote else quote
        else:
            depth += (character in "[{") - (character in "]}")
        if character == separator and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _value(text: str) -> Any:
    """Read a value as YAML, and ``1e-3`` as the number that it is.

    >>> _value("1e-3"), _value("none"), _value("null"), _value("[a, b]")
    (0.001, 'none', None, ['a', 'b'])
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is not a value in YAML: {error}") from error
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _find(name: str) -> type[SparseCallback] | None:
    """Return the method of that name, None for dense."""
    plain = {known.lower(): value for known, value in methods().items()}
    wanted = name.lower().replace("-", "").replace("_", "")
    if wanted == "dense":
        return None
    if wanted not in plain:
        names = {known.lower(): known for known in ["dense", *methods()]}
        near = [names[found] for found in get_close_matches(wanted, names, n=3)] or list(names.values())
        raise ValueError(f"no method is named {name!r}. Near: {', '.join(near)}. Write {SYNTAX}.")
    return plain[wanted]


def _defaults(method: str, written: Collection[str], recipe: Recipe, note: Callable[[str], None]) -> Arguments:
    """Return the method's arguments in the recipe, or in its own recipe; note what of that is not ``written``."""
    if recipe.method == method:
        return recipe.arguments
    twin = recipe.twin(method)
    if twin is None:
        return {}
    taken = ", ".join(f"{key}={value}" for key, value in twin.arguments.items() if key not in written)
    if taken:
        note(f"{method}: {taken}, as in the recipe {twin.name}")
    for key, value in recipe.differences(twin).items():
        if key not in written:
            remedy = f"; to do so, add :{key}={value}" if key.startswith(("model.", "data.")) else ""
            note(f"{method}: {twin.name} also sets {key}={value}, which is not taken over{remedy}")
    return twin.arguments


def _check(kind: type[SparseCallback], text: str, arguments: Arguments) -> None:
    """Raise unless the callback can be made."""
    for name, parameter in inspect.signature(kind).parameters.items():
        required = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if required and name not in arguments:
            raise ValueError(
                f"{kind.__name__} needs {name}, and no recipe of it for this network has one. "
                f"Write {text}:{name}=VALUE in --methods."
            )
    try:
        kind(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{text!r}: {error}") from error
