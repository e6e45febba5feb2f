"""What the site needs beyond docs/: pages from the repository's top level, formulas as MathML, docstrings."""

import inspect
import re
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from griffe import Class, Extension, Function, Object, Parameter, ParameterKind, Parameters
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

import lightning_sparse  # noqa: F401  (loads all classes that have options)
from lightning_sparse.compat.options import Options

#: files of the top level and the pages that they become
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "LICENSE": "LICENSE"}


#: how a block of commands begins: a word that is run, or a variable that is set for it
_COMMANDS = r"(?:lightning-sparse|make|pip|python|time|\.venv/\S+|[A-Z_]+=\S+) "


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Any, config: Any) -> Any:
    """Add the pages that do not lie in docs/."""
    root = Path(config.config_file_path).parent
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(root / name)))
    for notebook in sorted(root.glob("notebooks/*.ipynb")):
        files.append(File(f"notebooks/{notebook.name}", str(root), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links that work in the repository work in the site, where docs/ is the top level."""
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation"]  # it would name this page alone
    markdown = re.sub(rf"^```\n(?={_COMMANDS})", "```bash\n", markdown, flags=re.M)
    if page.file.src_uri.startswith("methods/"):
        markdown = _with_results(markdown, files.get_file_from_path("results.md").content_string)
    above = "docs/" if page.file.src_uri in PAGES.values() else "../" * (page.file.src_uri.count("/") + 1)

    def in_site(link: re.Match[str]) -> str:
        target = link[1].removeprefix(above)
        if target != link[1] and above != "docs/":  # it left docs/
            return f"]({above[3:]}{PAGES.get(target, target)}"
        return f"]({PAGES.get(target, target)}"

    return re.sub(r"\]\(([^)#\s]+)", in_site, markdown)


def _with_results(card: str, results: str) -> str:
    """Put the rows of docs/results.md that are of a card's method at the card's end."""
    method = re.search(r"`from lightning_sparse import (\w+)`", card)
    for heading, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", results, re.M | re.S):
        for header, rule, rows in re.findall(r"^(\|.+\n)(\|[ :|-]+\n)((?:\|.+\n)+)", body, re.M):
            ours = [r for r in rows.splitlines() if method and re.match(rf"\| {method[1]}[-@ ]", r, re.I)]
            if ours:
                card += "\n".join([f"\n**{heading}**", "", header + rule + "\n".join(ours), ""])
    return card


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    r"""Write formulas, ``\(..\)`` and ``\[..\]``, as MathML, which browsers show without a script or the network.

    A number and its percent sign stay on one line.
    """
    if page.file.src_uri.startswith("notebooks/"):  # whose Markdown MkDocs never sees
        return re.sub(r'href="\.\./(docs/[^"#]+|\w+\.md)', lambda m: _from_notebook(m[1], page, files), html)
    html = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: _mathml(m[1], "inline"), html, flags=re.S)
    block = r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>'
    html = re.sub(block, lambda m: _mathml(m[1], "block"), html, flags=re.S)
    return re.sub(r"<(pre|code)\b.*?</\1>|(?<=\d) (?=%)", lambda m: m[0] if m[1] else "&nbsp;", html, flags=re.S)


def _from_notebook(target: str, page: Any, files: Any) -> str:
    file = files.get_file_from_path(PAGES.get(target, target.removeprefix("docs/")))
    if file is None:
        raise PluginError(f"{page.file.src_uri} contains a link '../{target}', but there is no such page.")
    return f'href="{file.url_relative_to(page.file)}'


def _mathml(formula: str, display: str) -> str:
    bar = '<mo stretchy="false">&#x0007C;</mo>'  # which MathML takes for a relation, with space around it
    return str(convert(unescape(formula), display=display).replace(bar, bar.replace(">", ' lspace="0" rspace="0">', 1)))


class Docstrings(Extension):  # type: ignore[misc]
    """Show arguments that are made at import; turn ``:class:`~package.Name``` and doctests into Markdown."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of one module, class or function."""
        kind = getattr(sys.modules.get(obj.module.path), obj.name, None) if isinstance(obj, Class) else None
        if isinstance(kind, type) and issubclass(kind, Options) and kind.options() and obj.docstring:
            obj.docstring.value = kind.__doc__ or ""
            obj.set_member("__init__", Function("__init__", parameters=Parameters(*_parameters(kind))))
        if obj.docstring:
            text = re.sub(r":[a-z]+:`~?([\w.]*?)(\w+)`", _reference, obj.docstring.value)
            obj.docstring.value = re.sub(r"^( *)>>> .*(\n\1\S.*|\n\1 .*)*", _fenced, text, flags=re.M)


def _parameters(kind: type[Options]) -> Iterator[Parameter]:
    yield Parameter("self", kind=ParameterKind.positional_only)
    for option in kind.options():
        given = option.parameter
        how = ParameterKind.positional_or_keyword if option.positional else ParameterKind.keyword_only
        default = None if given.default is inspect.Parameter.empty else repr(given.default)
        yield Parameter(option.name, annotation=_annotation(option.annotation), kind=how, default=default)


def _annotation(kind: Any) -> str:
    """Write a type as source code does, with the values of a ``Literal``."""
    alternatives = get_args(kind) if inspect.formatannotation(get_origin(kind)) in _UNIONS else (kind,)
    texts = [inspect.formatannotation(each).replace("collections.abc.", "") for each in alternatives]
    return " | ".join("None" if each is NoneType else text for each, text in zip(alternatives, texts, strict=True))


_UNIONS = ("Union", "types.UnionType")


def _reference(role: re.Match[str]) -> str:
    return f"[{role[2]}][{role[1] or 'lightning_sparse.'}{role[2]}]"


def _fenced(doctest: re.Match[str]) -> str:
    return f"{doctest[1]}```pycon\n{doctest[0]}\n{doctest[1]}```"
