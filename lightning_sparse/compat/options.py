"""Options: the arguments of a class, declared as fields, each with its default, its rule and its text in one place.

A class declares what it adds or what it has another default for; its signature, its constructor, the ``Args`` of its
docstring and its ``repr`` are made of its own declarations and those of its bases.
"""

import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

from typing_extensions import dataclass_transform

from lightning_sparse.compat import checks

__all__ = ["Option", "Options", "fixed", "option"]

_REQUIRED: Any = inspect.Parameter.empty
_WIDTH = 116  # of a docstring's line, without the indentation of its class


@dataclass(frozen=True)
class Option:
    """One argument of a class.

    Attributes:
        name: the argument's.
        field: the attribute that holds its value.
        annotation: its type.
        default: its default; ``inspect.Parameter.empty``: the argument is required.
        doc: what it is, with unit and range.
        check: raises, called with the argument by its name, unless its value is good.
        positional: it may be given without its name.
        fixed: it is no argument: the class has the default for good.
    """

    name: str
    field: str
    annotation: Any
    default: Any = _REQUIRED
    doc: str = ""
    check: Callable[..., None] | None = None
    positional: bool = False
    fixed: bool = False

    @property
    def parameter(self) -> inspect.Parameter:
        """The argument as a signature has it."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if self.positional else inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(self.name, kind, default=self.default, annotation=self.annotation)

    def refuse(self, value: Any) -> None:
        """Raise unless ``value`` is one of the names that the type lists, or the flag it is, and passes the check."""
        union = get_origin(self.annotation) in (Union, UnionType)
        kinds = get_args(self.annotation) if union else (self.annotation,)
        if value is None and type(None) in kinds:
            return
        first, *others = (kind for kind in kinds if kind is not type(None))
        if get_origin(first) is Literal and not others:
            checks.one_of(get_args(first), **{self.name: value})
        if first is bool:
            checks.flag(**{self.name: value})
        if self.check is not None:
            self.check(**{self.name: value})


@dataclass(frozen=True)
class _Declared:
    """What a class body says of an option; None: as the base does."""

    default: Any = _REQUIRED
    doc: str | None = None
    check: Callable[..., None] | None = None
    alias: str | None = None
    kw_only: bool = True
    init: bool = True


def option(
    *,
    default: Any = _REQUIRED,
    doc: str | None = None,
    check: Callable[..., None] | None = None,
    alias: str | None = None,
    kw_only: bool = True,
    init: bool = True,
) -> Any:
    """Declare an option of a class, in its body: ``rate: float`` is made equal to what this returns.

    Args:
        default: left out: the argument is required.
        doc: what the argument is; default: what the base's says.
        check: such as ``partial(checks.fraction, "Usual are 0.1 to 0.5.")``; default: the base's.
        alias: name of the argument, if the field has another.
        kw_only: it must be given by its name.
        init: it is an argument; see ``fixed``.
    """
    return _Declared(default, doc, check, alias, kw_only, init)


def fixed(*, default: Any, init: Literal[False] = False) -> Any:
    """Declare that a class takes no argument for an option of its base, but has this value."""
    return _Declared(default=default, init=init)


@dataclass_transform(kw_only_default=True, field_specifiers=(option, fixed))
class Options:
    """Base of classes that declare their arguments as annotated fields.

    ``name: type = default`` gives an option of a base another default; ``option(...)`` declares more of it. What is no
    argument is annotated with ``ClassVar``, or in a method. ``__post_init__`` is called when all values are set.

    Example:
        >>> class Walk(Options):
        ...     '''Walk on.'''
        ...     speed: float = option(doc="metres a second.", kw_only=False)
        ...     steps: int = option(default=10, doc="how many.")
        >>> class Run(Walk):
        ...     '''Run on.'''
        ...     steps: int = 100
        >>> Run(3.0), Run(speed=3.0, steps=7), inspect.signature(Run)
        (Run(speed=3.0), Run(speed=3.0, steps=7), <Signature (speed: float, *, steps: int = 100) -> None>)
        >>> print(Run.__doc__)
        Run on.
        <BLANKLINE>
        Args:
            speed: metres a second.
            steps: how many.
        <BLANKLINE>
        Raises:
            ValueError: an argument is out of range.
        >>> Run(3.0, stepz=7)
        Traceback (most recent call last):
        TypeError: Run got an unexpected keyword argument 'stepz'. Did you mean 'steps'? It takes: speed, steps.
    """

    _own: ClassVar[dict[str, Option]] = {}  # by field: what the class itself declares
    _options: ClassVar[dict[str, Option]] = {}  # all that it has

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make the signature, the constructor and the docstring of the class."""
        super().__init_subclass__(**kwargs)
        cls._own = _declared(cls)
        cls._options = dict(sorted(cls._inherited().items(), key=lambda item: not item[1].positional))
        if "__init__" not in vars(cls):
            cls.__init__ = _constructor(cls)  # type: ignore[method-assign]  # "Cannot assign to a method"
            cls.__doc__ = _documented(cls.__doc__ or "", cls.options())

    def __post_init__(self) -> None:
        """Check what depends on several options, and make the rest of the state; a subclass calls its base's first."""

    def __repr__(self) -> str:
        """Show the arguments that differ from the defaults."""
        shown = [f"{name}={value!r}" for name, value in self.arguments.items() if not self._is_default(name, value)]
        return f"{type(self).__name__}({', '.join(shown)})"

    @classmethod
    def options(cls) -> list[Option]:
        """Return what the class takes, in the order of its signature."""
        return [known for known in cls._options.values() if not known.fixed]

    @property
    def arguments(self) -> dict[str, Any]:
        """The settings by name of the argument, as they are now."""
        fields = {known.name: known.field for known in self.options()}
        others = inspect.signature(type(self)).parameters.values()  # of a constructor that someone wrote, maybe
        named = [p.name for p in others if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        found = {**fields, **{name: name for name in named if name not in fields}}
        return {name: getattr(self, field) for name, field in found.items() if hasattr(self, field)}

    @classmethod
    def _inherited(cls) -> dict[str, Option]:
        """Return what the class and its bases declare, by field, the nearest first."""
        found: dict[str, Option] = {}
        for base in cls.__mro__:
            found |= {field: known for field, known in vars(base).get("_own", {}).items() if field not in found}
        return found

    @classmethod
    def _is_default(cls, name: str, value: Any) -> bool:
        known = next((known for known in cls.options() if known.name == name), None)
        default = known.default if known else inspect.signature(cls).parameters[name].default
        return bool(value == (list(default) if isinstance(default, tuple) else default))


def _declared(cls: type[Options]) -> dict[str, Option]:
    """Return the options that a class body declares, by field, and put their defaults in the place of declarations."""
    hints, bases, own = inspect.get_annotations(cls, eval_str=True), cls._inherited(), {}
    for field in hints:
        if ClassVar in (hints[field], get_origin(hints[field])) or field.startswith("_"):
            continue
        said = vars(cls).get(field, _Declared())
        if not isinstance(said, _Declared):  # a default alone
            said = _Declared(said)
        if field in bases and said.init and said.alias is None and bases[field].name != field:
            raise TypeError(
                f"{cls.__name__}.{field} must be declared with the name of its argument again, as in "
                f"{field}: ... = option(alias={bases[field].name!r}, ...): type checkers look no further."
            )
        base = bases.get(field, Option(said.alias or field, field, hints[field]))
        own[field] = replace(
            base,
            annotation=hints[field],
            default=said.default,
            doc=base.doc if said.doc is None else said.doc,
            check=said.check or base.check,
            positional=not said.kw_only,
            fixed=not said.init,
        )
        if said.default is not _REQUIRED:
            setattr(cls, field, said.default)
        elif field in vars(cls):
            delattr(cls, field)
    return own


def _constructor(cls: type[Options]) -> Callable[..., None]:
    """Return the constructor of a class, with its signature."""
    options = cls.options()
    receiver = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    signature = inspect.Signature([receiver, *(known.parameter for known in options)], return_annotation=None)

    def constructor(self: Options, *args: Any, **kwargs: Any) -> None:
        given = _bound(type(self).__name__, options, args, kwargs)
        for known in options:
            known.refuse(given[known.name])
            setattr(self, known.field, given[known.name])
        self.__post_init__()

    constructor.__signature__ = signature  # type: ignore[attr-defined]  # a function has any attribute
    constructor.__name__, constructor.__qualname__ = "__init__", f"{cls.__qualname__}.__init__"
    constructor.__module__ = cls.__module__
    return constructor


def _bound(method: str, options: Sequence[Option], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the value of each option in a call.

    Raises:
        TypeError: one is unknown, missing or given twice, or there are too many without a name.
    """
    names = [known.name for known in options]
    for wrong in kwargs.keys() - set(names):
        near = get_close_matches(wrong, names, n=1)
        raise TypeError(
            f"{method} got an unexpected keyword argument {wrong!r}. "
            + "".join(f"Did you mean {name!r}? " for name in near)
            + f"It takes: {', '.join(names)}."
        )
    positional = [known.name for known in options if known.positional]
    if len(args) > len(positional):
        raise TypeError(
            f"{method} takes {', '.join(positional) or 'nothing'} without a name, got {len(args)} such arguments. "
            f"Name the others: {', '.join(name for name in names if name not in positional)}."
        )
    given = dict(zip(positional, args, strict=False))
    for twice in given.keys() & kwargs.keys():
        raise TypeError(f"{method} got multiple values for the argument {twice!r}. Give it once.")
    given |= kwargs
    for known in options:
        if known.name not in given:
            if known.default is _REQUIRED:
                raise TypeError(f"{method} is missing the argument {known.name!r}: {known.doc}")
            given[known.name] = known.default
    return given


def _documented(doc: str, options: Sequence[Option]) -> str:
    """Return a docstring with the options' text as its ``Args``, before its other sections."""
    lines = inspect.cleandoc(doc).splitlines()
    sections = ("Raises:", "Example:", "Reference:", "Attributes:", "Note:")
    first = at = next((i for i, line in enumerate(lines) if line in sections), len(lines))
    told = [known for known in options if known.doc]
    if not told:
        return "\n".join(lines)
    args = ["Args:"]
    for known in told:
        args += textwrap.wrap(f"{known.name}: {known.doc}", _WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8)
    raises = ["Raises:", "    ValueError: an argument is out of range."]
    if lines[at : at + 1] == ["Raises:"]:
        raises, at = [*raises, *lines[at + 1 :]], len(lines)
    parts = [lines[:first], args, raises, lines[at:]]
    return "\n\n".join("\n".join(part).strip("\n") for part in parts if part)
