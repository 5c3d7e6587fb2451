"""The package is built as docs/house.md says: its table is read here, and held against the imports of all modules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ltm_pyro"
PAGE = (ROOT / "docs/house.md").read_text()
MOST_ENTRIES = 21


@dataclass(frozen=True)
class Room:
    """A row of the table."""

    name: str
    entries: list[str]
    """What of the package it consists of, as the file system names it."""
    may_import: list[str]
    """Names of other rooms, or of single modules in them, as in `models.batch`."""


def rooms_of(page: str) -> list[Room]:
    """The rows of a page's table of rooms, from the top of the house down."""
    rows = re.findall(r"^\| ([\w ]+) \| (`[^|]+) \| (?:[^|\\]|\\.)+ \| ([^|]+) \|$", page, flags=re.MULTILINE)
    return [
        Room(
            name,
            [entry.rstrip("/") for entry in re.findall(r"`([^`]+)`", entries)],
            [below.strip("`") for below in may_import.split(", ") if below != "nothing"],
        )
        for name, entries, may_import in rows
    ]


def modules_of(package: Path) -> dict[str, Path]:
    """The modules of a package by their dotted names below it; that of its own `__init__.py` is empty."""
    return {
        ".".join(path.relative_to(package).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
        for path in sorted(package.rglob("*.py"))
    }


def imports_of(package: Path) -> dict[str, set[str]]:
    """What each module imports of its own package, anywhere in its text: in a function, or for a type checker, too."""
    modules = modules_of(package)
    return {name: set(_imported(name, path, package.name, modules)) for name, path in modules.items()}


def _imported(name: str, path: Path, package: str, modules: dict[str, Path]) -> Iterator[str]:
    is_init = path.name == "__init__.py"
    inside = [package, *filter(None, name.split("."))]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) - node.level + is_init] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            found = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for dotted in found:
            top, _, below = dotted.partition(".")
            if top == package:  # a name may be that of a module, or stand in one
                yield below if below in modules else below.rpartition(".")[0]


def entry_of(module: str, package: Path) -> str:
    """The file or folder of the package that a module is, or lies in."""
    top = module.partition(".")[0] or "__init__"
    return top if (package / top).is_dir() else f"{top}.py"


def forbidden_imports(package: Path, rooms: list[Room]) -> list[str]:
    """The imports that the table does not allow."""
    room_of = {entry: room for room in rooms for entry in room.entries}

    def is_allowed(importer: str, imported: str) -> bool:
        here, there = room_of[entry_of(importer, package)], room_of[entry_of(imported, package)]
        return here is there or any(
            there.name == below or imported == below or imported.startswith(f"{below}.") for below in here.may_import
        )

    return [
        f"{importer or '__init__'} imports {imported or '__init__'}"
        for importer, found in imports_of(package).items()
        for imported in sorted(found)
        if not is_allowed(importer, imported)
    ]


def test_every_entry_of_the_package_has_one_room():
    entries = sorted(path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed"))
    assert sorted(entry for room in rooms_of(PAGE) for entry in room.entries) == entries


def test_the_package_has_few_entries():
    assert len([path for path in PACKAGE.iterdir() if path.name != "__pycache__"]) <= MOST_ENTRIES


def test_the_table_allows_imports_downwards_only():
    rooms = rooms_of(PAGE)
    names = [room.name for room in rooms]
    for place, room in enumerate(rooms):
        assert {below.partition(".")[0] for below in room.may_import} <= set(names[place + 1 :]), room.name


def test_no_module_imports_what_the_table_does_not_allow():
    assert forbidden_imports(PACKAGE, rooms_of(PAGE)) == []


def test_no_modules_import_each_other_in_a_circle():
    try:
        TopologicalSorter(imports_of(PACKAGE)).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


TABLE = """
| room | in the package | what is in it | may import |
|---|---|---|---|
| front | `__init__.py` | names | upper, lower |
| upper | `top/` | one | `lower.door` |
| lower | `lower/` | another | nothing |
"""


@pytest.mark.parametrize(
    ("module", "code", "expected"),
    [
        ("lower/a.py", "import house.top.a", "lower.a imports top.a"),
        ("lower/a.py", "from house import top", "lower.a imports top"),
        ("lower/a.py", "from house.top.a import name", "lower.a imports top.a"),
        ("lower/a.py", "from ..top import a", "lower.a imports top.a"),
        ("lower/a.py", "def later():\n    from house.top import name", "lower.a imports top"),
        ("lower/a.py", "if TYPE_CHECKING:\n    from house.top.a import Type", "lower.a imports top.a"),
        ("lower/a.py", "import house", "lower.a imports __init__"),
        ("lower/__init__.py", "from .. import top", "lower imports top"),
        ("top/a.py", "from house.lower import secret", "top.a imports lower"),
        ("top/a.py", "from house.lower.door import name", None),
        ("top/a.py", "from house.lower import door", None),
        ("top/a.py", "from house.top import name\nimport torch", None),
        ("lower/a.py", "from .door import name", None),
        ("__init__.py", "from house.top.a import name", None),
    ],
)
def test_an_import_that_the_table_does_not_allow_is_found(module, code, expected, tmp_path):
    package = tmp_path / "house"
    for path in ("__init__.py", "top/__init__.py", "top/a.py", "lower/__init__.py", "lower/a.py", "lower/door.py"):
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(code if path == module else "")
    assert forbidden_imports(package, rooms_of(TABLE)) == ([expected] if expected else [])
