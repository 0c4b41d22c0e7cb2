"""What loads what: imports point down the list of rooms, and light modules stay light."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import distributed_eg

PACKAGE = Path(distributed_eg.__file__).parent
ROOMS = ["examples", "cli", "report", "benchmarks", "strategy", "runtime", "store", "schedule", "method"]
"""From the top down; a module may import from its own room and from those after it."""
SHARED = ["config", "given", "masking", "errors", "types"]
"""What every room may import; each may import from those after it."""


def modules(room: str | None = None) -> list[str]:
    """Dotted names of all modules of the package, or of one room."""
    root = PACKAGE if room is None else PACKAGE / room
    names = []
    for path in sorted(root.rglob("*.py")):
        parts = ("distributed_eg", *path.relative_to(PACKAGE).with_suffix("").parts)
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def source(name: str) -> Path:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(name: str) -> Iterator[tuple[str, int]]:
    """Every module that ``name`` imports, at any depth and under any condition, with the line; relative imports and
    ``import_module("…")`` of a constant included."""
    package = name if source(name).name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source(name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in MODULES else base), node.lineno
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


MODULES = modules()


def room_of(name: str) -> str:
    """The room of a module; "__main__" belongs to the command line, and the package itself to nobody."""
    parts = name.split(".")
    if len(parts) == 1:
        return ""
    return "cli" if parts[1] == "__main__" else parts[1]


def depth(room: str) -> int:
    return [*ROOMS, *SHARED].index(room)


def loaded_by(*names: str) -> set[str]:
    """Top-level names in sys.modules after importing ``names`` in a process of its own."""
    code = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]): importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, json.dumps(names)],
        cwd=PACKAGE.parent,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_package_loads_neither_torch_nor_ray() -> None:
    """`distributed-eg --help` and a shell's completion do not wait for them."""
    assert not loaded_by("distributed_eg") & {"torch", "ray", "avalanche", "pyarrow", "numpy"}


def test_configuration_errors_and_types_load_nothing_heavy() -> None:
    names = [f"distributed_eg.{name}" for name in SHARED]
    assert not loaded_by(*names) & {"torch", "ray", "avalanche", "pyarrow", "numpy"}


def test_the_method_loads_torch_and_no_machinery() -> None:
    loaded = loaded_by(*modules("method"))
    assert "torch" in loaded
    assert not loaded & {"ray", "avalanche", "pyarrow"}


def test_the_schedule_loads_no_library_at_all() -> None:
    names = modules("schedule")
    assert len(names) > 1
    assert not loaded_by(*names) & {"ray", "avalanche", "torch", "pyarrow", "numpy"}


def test_the_run_directory_is_read_without_ray_and_avalanche() -> None:
    assert not loaded_by(*modules("store")) & {"ray", "avalanche"}


def test_only_the_ray_backend_imports_ray() -> None:
    found = [
        f"{name}:{line} imports {imported}"
        for name in MODULES
        for imported, line in imports(name)
        if imported.partition(".")[0] == "ray" and not name.startswith("distributed_eg.runtime.ray_backend")
    ]
    assert found == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions and those for type checkers only count, too."""
    graph = {name: {imported for imported, _ in imports(name) if imported in MODULES} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_files_and_functions_are_short() -> None:
    """No file above 350 lines, no function above 60, but the strategy's constructor, which is its signature."""
    found = []
    for name in MODULES:
        text = source(name).read_text(encoding="utf-8")
        if text.count("\n") > 350:
            found.append(f"{name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60:
                found.append(f"{name}: {node.name}")
    assert found == ["distributed_eg.strategy.strategy: __init__"]


def test_every_module_stands_in_a_known_room() -> None:
    """A new room must be given its place in the list before it may import anything."""
    assert {room_of(name) for name in MODULES} <= {"", *ROOMS, *SHARED}


def test_imports_point_down_the_list_of_rooms() -> None:
    found = []
    for name in MODULES:
        if room_of(name) in ("", "examples"):  # these import what users import
            continue
        for imported, line in imports(name):
            if imported.partition(".")[0] != "distributed_eg":
                continue
            if not room_of(imported):
                found.append(f"{name}:{line} imports the package's own face, which stands above every room")
            elif depth(room_of(imported)) < depth(room_of(name)):
                found.append(f"{name}:{line} imports {imported}")
    assert found == []


def test_the_package_s_face_imports_rooms_for_type_checkers_only() -> None:
    tree = ast.parse(source("distributed_eg").read_text(encoding="utf-8"))
    direct = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in direct if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "." for node in direct if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.startswith((".", "distributed_eg"))]


def test_public_names_are_found_and_others_are_not() -> None:
    assert set(distributed_eg.__all__) <= set(dir(distributed_eg))
    with pytest.raises(AttributeError, match="'nothing_of_that_name'"):
        _ = distributed_eg.nothing_of_that_name


def test_the_coordinator_waits_for_no_torch() -> None:
    """A run's first stage waits for it, and whoever killed it for its return; torch alone takes seconds."""
    assert not {"torch", "torchvision", "avalanche"} & set(loaded_by("distributed_eg.runtime.coordinator"))
