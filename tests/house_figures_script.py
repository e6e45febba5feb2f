"""Print the figures of a house: ``house_figures_script.py [FOLDER]``, the folder of the package, by default ours.

They come from the syntax trees alone, so that revisions of other layouts can be measured, too. The floors are those of
``tests/test_house.py`` beside the package; where they do not fit, arrows of cycles are counted, not those that run up.
Needs Python 3.11.
"""

import ast
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from statistics import median, quantiles

import tomllib

PACKAGE = "lightning_sparse"
FRAMEWORKS = ("torch", "lightning", "pytorch_lightning")
#: private names of torch's modules and optimizers, which a subclass could define or use on ``self``
KNOWN = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_get_name", "_apply"}
KNOWN |= {"_save_to_state_dict", "_load_from_state_dict", "_named_members", "_call_impl", "_conv_forward"}
NAMED_TUPLE = {"_fields", "_replace", "_asdict", "_make"}  # public, whatever they look like


class House:
    """The files of a package and what their names stand for."""

    def __init__(self, root):
        self.root = root
        self.trees = {file: ast.parse(file.read_text()) for file in sorted(root.rglob("*.py"))}
        self.lines = {file: file.read_text().splitlines() for file in self.trees}
        self.classes = {(file, node.name): node for file in self.trees for node in self.nodes(file, ast.ClassDef)}
        self.imports = {file: dict(self.names(file)) for file in self.trees}

    def nodes(self, file, kind):
        return [node for node in ast.walk(self.trees[file]) if isinstance(node, kind)]

    def room(self, file):
        return file.relative_to(self.root).with_suffix("").parts[0]

    def place(self, file):
        return str(file.relative_to(self.root))

    def file(self, module):
        """Return the file of a dotted module of the package, None if it is another's."""
        first, *rest = module.split(".")
        path = self.root.joinpath(*rest)
        found = [path / "__init__.py", path.with_suffix(".py")] if rest else [path / "__init__.py"]
        return next((file for file in found if first == PACKAGE and file in self.trees), None)

    def names(self, file):
        """Yield the names that a file imports, each with module and name there (None: the module itself)."""
        for node in self.nodes(file, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], (alias.name, None)
        for node in self.nodes(file, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, (node.module or "", alias.name)

    def found(self, file, name):
        """Follow imports from a name in a file to the class that it stands for: file and name, or None."""
        for _ in range(9):
            if (file, name) in self.classes:
                return file, name
            module, name = self.imports[file].get(name, ("", None))
            file = self.file(module)
            if file is None or name is None:
                return None
        return None

    def bases(self, key):
        """Return the bases of a class: keys, or names of classes that are not the package's; without ABC."""
        named = [base.value if isinstance(base, ast.Subscript) else base for base in self.classes[key].bases]
        names = [ast.unparse(base) for base in named]
        return [self.found(key[0], name) or name for name in names if name not in ("object", "ABC", "Protocol")]

    def depth(self, key):
        if key not in self.classes:
            return 0
        return max((1 + self.depth(base) for base in self.bases(key)), default=0)

    def line(self, key):
        """Return a class and those of the package that it descends from, as keys."""
        if key not in self.classes:
            return set()
        return {key}.union(*map(self.line, self.bases(key)))


def own(node):
    """Return the names that a class body defines or its methods give ``self``, without dunders."""
    found = {item.name for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))}
    targets = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
    targets += [target for item in node.body if isinstance(item, ast.Assign) for target in item.targets]
    found |= {target.id for target in targets if isinstance(target, ast.Name)}
    found |= {
        item.attr
        for item in ast.walk(node)
        if isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store) and ast.unparse(item.value) == "self"
    }
    return {name for name in found if not name.startswith("__")}


def arrows(house):
    """Return the pairs of rooms of which the first imports from the second; ``__init__`` is the package's face."""
    rooms = {house.room(file) for file in house.trees}
    found = set()
    for file in house.trees:
        for _, (module, name) in house.names(file):
            first, *rest = module.split(".")
            if first == PACKAGE:
                there = rest[0] if rest else name
                found.add((house.room(file), there if there in rooms else "__init__"))
    return {(a, b) for a, b in found if a != b}


def cyclic(pairs):
    """Return the arrows whose end leads back to their start."""

    def reached(start):
        seen, todo = set(), [start]
        while todo:
            room = todo.pop()
            new = {b for a, b in pairs if a == room} - seen
            seen |= new
            todo += new
        return seen

    return {(a, b) for a, b in pairs if a in reached(b)}


def floors(root):
    """Return FLOORS of the tests beside the package, if there are any."""
    test = root.parent / "tests" / "test_house.py"
    for node in ast.parse(test.read_text()).body if test.exists() else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            return ast.literal_eval(node.value)
    return ()


def asks_for_store(house):
    """Yield where it is asked which store a method or weight has, outside the rooms that hold stores."""
    stores = {name for _, name in house.classes if name.startswith("Sparse")} - {"SparseCallback"}
    for file in house.trees:
        room = house.room(file)
        for node in house.nodes(file, ast.Compare) if room != "storage" else ():
            sides = [node.left, *node.comparators]
            held = {getattr(side, "attr", getattr(side, "id", "")).lstrip("_") for side in sides}
            texts = [item for side in sides for item in ast.walk(side) if isinstance(item, ast.Constant)]
            if held & {"storage", "store"} and any(isinstance(text.value, str) for text in texts):
                yield file, node.lineno
        for node in house.nodes(file, ast.Call) if room not in ("storage", "layers", "weights") else ():
            if ast.unparse(node.func) == "isinstance":
                kinds = [getattr(item, "attr", getattr(item, "id", "")) for item in ast.walk(node.args[1])]
                if stores & set(kinds):
                    yield file, node.lineno


def private(name):
    return name.startswith("_") and not name.startswith("__") and name not in {"_", *NAMED_TUPLE}


def private_corners(house):
    """Yield where a private name of torch or Lightning is used, outside ``compat``.

    A private attribute is theirs if its chain starts at something imported from them, or, on any object whose origin
    is not another library, if nothing in the package defines the name (``KNOWN`` apart, which both may define).
    """
    ours = {node.name for file in house.trees for node in house.nodes(file, (ast.FunctionDef, ast.ClassDef))}
    for file in house.trees:
        ours |= {node.id for node in house.nodes(file, ast.Name) if isinstance(node.ctx, ast.Store)}
        stored = [node for node in house.nodes(file, ast.Attribute) if isinstance(node.ctx, ast.Store)]
        ours |= {node.attr for node in stored if ast.unparse(node.value) == "self"}
    for file in house.trees:
        if house.room(file) == "compat":
            continue
        for node in house.nodes(file, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            module = getattr(node, "module", None)
            whole = [f"{module}.{name}" for name in names] if module else names
            if any(name.split(".")[0] in FRAMEWORKS and any(map(private, name.split("."))) for name in whole):
                yield file, node.lineno
        for node in house.nodes(file, ast.FunctionDef):
            if node.name in KNOWN:
                yield file, node.lineno
        for node in house.nodes(file, (ast.Attribute, ast.Call)):
            if isinstance(node, ast.Attribute):
                name, holder = node.attr, node.value
            elif ast.unparse(node.func) in ("getattr", "hasattr", "setattr") and isinstance(node.args[1], ast.Constant):
                name, holder = node.args[1].value, node.args[0]
            else:
                continue
            root = holder
            while isinstance(root, (ast.Attribute, ast.Call, ast.Subscript)):
                root = root.func if isinstance(root, ast.Call) else root.value
            origin = house.imports[file].get(getattr(root, "id", ""), ("", None))[0].split(".")[0]
            if private(name) and (origin in FRAMEWORKS or (not origin and (name in KNOWN or name not in ours))):
                yield file, node.lineno


def docstrings(house, file):
    """Return the lines of a file's docstrings, without blank ones."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in house.nodes(file, kinds)]
    return [line.strip() for text in texts for line in text.splitlines() if line.strip()]


def wheel_lines(root):
    """Return how many lines the wheel holds: Python, YAML and the marker of types."""
    project = root.parent / "pyproject.toml"
    tool = tomllib.loads(project.read_text()).get("tool", {}) if project.exists() else {}
    left_out = tool.get("hatch", {}).get("build", {}).get("targets", {}).get("wheel", {}).get("exclude", [])
    total = 0
    for file in root.rglob("*"):
        path = f"/{file.relative_to(root.parent)}"
        wanted = file.suffix in (".py", ".yaml") or file.name == "py.typed"
        if wanted and not any(fnmatch(path, f"*/{rest.strip('/')}{end}") for rest in left_out for end in ("", "/*")):
            total += len(file.read_text().splitlines())
    return total


def show(figure, value, details=()):
    print(f"{figure:<52}{value:>8}")
    for detail in details:
        print(f"    {detail}")


def places(house, found):
    """Return the lines as texts, one for each file."""
    by_file = {}
    for file, line in sorted(set(found)):
        by_file.setdefault(house.place(file), []).append(str(line))
    return [f"{file}:{','.join(lines)}" for file, lines in by_file.items()]


def main(root):
    house = House(root)
    rooms = {house.room(file) for file in house.trees} - {"__init__"}
    pairs, order = arrows(house), floors(root)
    show("rooms", len(rooms))
    show("arrows between rooms, __init__ among them", len(pairs))
    if {*rooms, "__init__"} == set(order):
        up = sorted((a, b) for a, b in pairs if order.index(b) > order.index(a))
        show("arrows that run up", len(up), [f"{a} -> {b}" for a, b in up])
    show("arrows that are part of cycles", len(cyclic(pairs)))

    files = [file for file in house.trees if house.room(file) == "methods" and file.name != "__init__.py"]
    methods = [key for key in house.classes if key[0] in files and not key[1].startswith("_")]
    methods = [key for key in methods if "SparseCallback" in {name for _, name in house.line(key)}]
    depths = {key[1]: house.depth(key) for key in methods}
    members = {key[1]: len(set().union(*(own(house.classes[k]) for k in house.line(key)))) for key in methods}
    named = [f"{key[1]}: {depths[key[1]]} bases deep, {members[key[1]]} members" for key in methods]
    show("method classes", len(methods), named)
    show("depth of bases: largest", max(depths.values()))
    show("members, with the bases' in the package: median", f"{median(members.values()):g}")
    show("members: largest", max(members.values()))

    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    sizes = {
        f"{house.place(file)} {name}": (
            sum(isinstance(item, functions) for item in node.body),
            node.end_lineno - node.lineno + 1,
        )
        for (file, name), node in house.classes.items()
    }
    show("methods of the largest class", max(count for count, _ in sizes.values()))
    show("lines of the longest class", max(lines for _, lines in sizes.values()))
    large = {name: size for name, size in sizes.items() if size[0] > 25 or size[1] > 300}
    listed = [f"{name}: {count} methods, {lines} lines" for name, (count, lines) in large.items()]
    show("classes over 25 methods or 300 lines", len(large), listed)

    asked = list(asks_for_store(house))
    show("places outside the stores that ask for the store", len(asked), places(house, asked))

    lengths = {file.name: len(house.lines[file]) for file in files}
    long = [f"{name}: {count}" for name, count in sorted(lengths.items(), key=lambda item: -item[1]) if count > 80]
    show("files of methods: median of lines", f"{median(lengths.values()):g}")
    show(f"files of methods over 80 lines, of {len(files)}", len(long), [", ".join(long)])
    spans = [node.end_lineno - node.lineno + 1 for file in house.trees for node in house.nodes(file, functions)]
    show("functions", len(spans))
    show("lines of a function: median", f"{median(spans):g}")
    show("lines of a function: 90th percentile", f"{quantiles(spans, n=10, method='inclusive')[-1]:g}")

    texts = {file: docstrings(house, file) for file in files}
    holders = Counter(line for lines in texts.values() for line in set(lines))
    every = [line for lines in texts.values() for line in lines]
    shared = sum(holders[line] > 1 for line in every)
    show("lines of docstrings in methods/", len(every))
    show("share of them that another method has, too", f"{shared / len(every):.1%}")
    show("lines in the wheel", wheel_lines(root))
    corners = set(private_corners(house))
    show("lines with private corners outside compat/", len(corners), places(house, corners))


if __name__ == "__main__":
    here = Path(__file__).resolve().parent.parent / PACKAGE
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else here)
