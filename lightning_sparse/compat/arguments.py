"""Arguments of a method and of the bases that it hands its ``options`` to: which there are, and which are refused."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import wraps
from typing import Any

__all__ = ["parameters", "refusing_by_name"]


def refusing_by_name(init: Callable[..., None]) -> Callable[..., None]:
    """Return a constructor of which an unknown argument is refused in the name of the class that was called."""

    @wraps(init)
    def constructor(self: Any, *args: Any, **options: Any) -> None:
        try:
            init(self, *args, **options)
        except TypeError as error:
            kind = type(self)
            wrong = _refused(kind, init, options, str(error)) if kind.__init__ is constructor else None
            if wrong is None:
                raise
            known = [name for name in _accepted(kind) if name != wrong]
            near = get_close_matches(wrong, known, n=1)
            raise TypeError(
                f"{kind.__name__} got an unexpected keyword argument {wrong!r}. "
                + "".join(f"Did you mean {name!r}? " for name in near)
                + f"It takes: {', '.join(known)}."
            ) from error

    return constructor


def _refused(kind: type, init: Callable[..., None], options: Mapping[str, Any], error: str) -> str | None:
    """Return the argument that Python refused in a call of ``kind``, None if it was another mistake."""
    if error.startswith(f"{init.__qualname__}() missing"):  # because its name is written in another way?
        return next((name for name in options if name not in _accepted(kind)), None)
    found = re.search(r"(?:unexpected|multiple values for)(?: keyword)? argument '(\w+)'", error)
    return found[1] if found and found[1] in options and found[1] not in inspect.signature(kind).parameters else None


def parameters(kind: type) -> Iterator[inspect.Parameter]:
    """Yield the parameters of a class and of the bases that take its ``options``; a name may come twice."""
    for base in kind.__mro__:
        constructor = vars(base).get("__init__")
        own = list(inspect.signature(constructor).parameters.values())[1:] if constructor else []
        yield from own
        if own and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
            break


def _accepted(kind: type) -> list[str]:
    """Return what a class takes by name; what a base requires is given by the class itself."""
    own = inspect.signature(kind).parameters
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = [p.name for p in parameters(kind) if p.kind in named and (p.name in own or p.default is not p.empty)]
    return list(dict.fromkeys(found))
