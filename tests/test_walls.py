"""The walls of the house: who may import whom, and how big a room may become.

Every wall is a function of a folder, so that each is also seen to fall, in a house built for it.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

import softtrace
from tests.support.waiting import PATIENCE

HOUSE = Path(softtrace.__file__).parent
RECIPES = Path(__file__).resolve().parents[1] / "recipes"

#: from the top down; a wing imports from the floors below its own, and not from its neighbour
FLOORS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("report",),
    ("evaluation",),
    ("lightning", "hf"),
    ("decoding",),
    ("metrics",),
    ("loss",),
    ("density",),
    ("tracing",),
    ("anatomy",),
    ("model",),
    ("graph",),
    ("data",),
    ("",),  # the modules beside the wings: errors, checks, files, percent ...
)
FLOOR_OF = {wing: floor for floor, wings in enumerate(FLOORS) for wing in wings}
#: what the library is without a trainer, a plot or a page
CORE = ("graph", "model", "anatomy", "tracing", "density", "loss")
#: heavy guests, and where they live: a wing or a single module
GUESTS: dict[str, tuple[str, ...]] = {
    # cli.fit *is* Lightning's command line
    "lightning": ("lightning", "cli.fit"),
    "pytorch_lightning": (),  # the same under its old name; two of them would not know one another
    "lightning_fabric": (),
    "torchmetrics": ("metrics", "lightning.monitor"),
    # metrics of torchmetrics draw themselves where a user asks: plot() is of that interface
    "matplotlib": ("report", "metrics.plotting"),
    "jinja2": ("report",),
    "trl": (),  # its trainers come to us: with_density takes any
}
MODULES_AT_THE_ROOT = 7
LINES = 400
KINDS = (".py", ".js", ".css", ".j2")


@dataclass(frozen=True)
class Import:
    """One line that imports: ``module`` and ``target`` are dotted names, ``how`` says if aside."""

    where: str
    module: str
    target: str
    how: str

    def __str__(self) -> str:
        return f"{self.where} imports {self.target}{self.how}"


def modules_of(root: Path) -> dict[str, Path]:
    """Dotted name, of a package for its ``__init__``, to file."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(root: Path) -> list[Import]:
    """Every import of every module, wherever in it: at the top, in a function, for types only."""
    modules, found = modules_of(root), []
    for module, path in modules.items():
        package = module if path.stem == "__init__" else module.rpartition(".")[0]
        for node, how in _import_nodes(ast.parse(path.read_text("utf-8")), ""):
            where = f"{path.relative_to(root.parent)}:{node.lineno}"
            targets = dict.fromkeys(_targets(node, package, modules))
            found += [Import(where, module, target, how) for target in targets]
    return found


def _import_nodes(tree: ast.AST, how: str) -> Iterator[tuple[Any, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) or _names_a_module(node):
            yield node, how
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _import_nodes(node, how or " (inside a function)")
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _import_nodes(ast.Module(node.body, []), " (for types only)")
            yield from _import_nodes(ast.Module(node.orelse, []), how)
        else:
            yield from _import_nodes(node, how)


def _names_a_module(node: Any) -> bool:
    """Whether this is ``importlib.import_module("...")`` or ``__import__("...")``."""
    called = isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2]
    return called in ("import_module", "__import__") and isinstance(node.args[0], ast.Constant)


def _targets(node: Any, package: str, modules: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Call):
        yield str(ast.literal_eval(node.args[0]))
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    else:
        above = package.split(".")[: len(package.split(".")) + 1 - node.level]
        origin = ".".join([*(above if node.level else ()), *filter(None, [node.module])])
        for alias in node.names:  # `from softtrace import errors` is the module, not the package
            inner = f"{origin}.{alias.name}"
            yield inner if inner in modules else origin


def wing_of(module: str, root: Path) -> str | None:
    """Of a module inside the package; "" beside the wings, None for the package's own face."""
    _, *rest = module.split(".")
    if not rest:
        return None
    return rest[0] if (root / rest[0]).is_dir() else ""


# --- the walls: each a function of a folder to its complaints


def upward(root: Path) -> list[str]:
    """Imports only go down, and the face of the package is for those outside."""
    found = [
        f"{root.name}/{folder.name}/ is not on the list of wings"
        for folder in sorted(root.iterdir())
        if any(folder.glob("*.py")) and folder.name not in FLOOR_OF
    ]
    for each in imports_of(root):
        if each.module == root.name or each.target.split(".")[0] != root.name:
            continue
        here, there = wing_of(each.module, root), wing_of(each.target, root)
        if there is None:
            found.append(f"{each}, the face of the package; import from the module itself")
        elif here != there and FLOOR_OF.get(there, -1) <= FLOOR_OF.get(str(here), -1):
            found.append(f"{each}: {here or 'the root'} lies below {there}, or beside it")
    return found


def circles(root: Path) -> list[str]:
    """No module needs itself, by whatever way round; types count, for a reader goes round too."""
    known, graph = modules_of(root), nx.DiGraph()
    for each in imports_of(root):
        if each.target in known and each.target != each.module:
            graph.add_edge(each.module, each.target, said=str(each))
    found = []
    for circle in nx.strongly_connected_components(graph):
        if len(circle) > 1:
            # A subgraph lists its nodes in the order of hashes; where to begin is told instead.
            edges = nx.find_cycle(graph.subgraph(circle), source=min(circle))
            found.append("a circle: " + "; ".join(graph.edges[edge]["said"] for edge in edges))
    return sorted(found)


def strangers(root: Path) -> list[str]:
    """Trainers, plots and pages stay in their wings."""
    found = []
    for each in imports_of(root):
        guest, (_, *place) = each.target.split(".")[0], each.module.split(".")
        homes = [home.split(".") for home in GUESTS.get(guest, ())]
        if guest in GUESTS and not any(place[: len(home)] == home for home in homes):
            found.append(f"{each}, which belongs in {', '.join(GUESTS[guest]) or 'no module'}")
    return found


def crowded(root: Path) -> list[str]:
    """Few modules beside the wings."""
    there = sorted(path.name for path in root.glob("*.py") if path.name != "__init__.py")
    many = len(there) > MODULES_AT_THE_ROOT
    said = f"{root.name}/ holds {len(there)} modules, allowed are {MODULES_AT_THE_ROOT}: "
    return [said + ", ".join(there)] if many else []


def long_files(root: Path) -> list[str]:
    """No file that one has to scroll through."""
    lines = {
        path.relative_to(root.parent): len(path.read_text("utf-8").splitlines())
        for path in sorted(root.rglob("*"))
        if path.suffix in KINDS
    }
    return [f"{path}: {n} lines, allowed are {LINES}" for path, n in lines.items() if n > LINES]


def loaded(root: Path, beneath: tuple[str, ...] = ("torch", "transformers")) -> list[str]:
    """No wing of the core brings a guest along, not even through what it imports.

    Args:
        root: of the package.
        beneath: what the core stands on. Guests that come with these (transformers reads chat
            templates by jinja2) are not the core's doing.
    """
    wings = [root.name, *(f"{root.name}.{wing}" for wing in CORE)]
    script = (
        "import importlib, sys\n"
        f"for name in {beneath!r}: importlib.import_module(name)\n"
        f"for wing in {wings!r}:\n"
        "    before = set(sys.modules)\n"
        "    importlib.import_module(wing)\n"
        f"    for guest in sorted({set(GUESTS)!r} & (set(sys.modules) - before)):\n"
        "        print(f'importing {wing} loads {guest}')\n"
    )
    # A new interpreter: this one has loaded them all.
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(root.parent)},
    )  # fmt: skip
    return done.stdout.splitlines() + done.stderr.splitlines()[-1:] * (done.returncode != 0)


Wall = Callable[[Path], list[str]]
READ: tuple[Wall, ...] = (upward, circles, strangers, crowded, long_files)


@pytest.mark.parametrize(
    "wall",
    [*READ, pytest.param(loaded, marks=pytest.mark.thorough)],
    ids=lambda wall: wall.__name__,
)
def test_the_house_stands(wall: Wall) -> None:
    assert not (found := wall(HOUSE)), "\n".join(found)


def test_every_reason_for_a_skip_is_on_one_list() -> None:
    """Nothing is skipped, or expected to fail, for a reason that tests/support/skips.py lacks."""
    skipping = re.compile(r"skipif|importorskip|pytest\.skip\b|mark\.skip\b|xfail|SkipTest")
    tests = Path(__file__).parent
    allowed = {tests / "support" / "skips.py", Path(__file__)}
    files = [path for path in tests.rglob("*.py") if path not in allowed]
    assert len(files) > 150
    assert [str(path) for path in files if skipping.search(path.read_text("utf-8"))] == []
    assert len(skipping.findall((tests / "support" / "skips.py").read_text("utf-8"))) == 3


def test_no_recipe_is_too_long() -> None:
    assert not (found := long_files(RECIPES)), "\n".join(found)


# --- each wall is seen to fall


def on_its_own(root: Path) -> list[str]:
    return loaded(root, beneath=())


#: a house in which nothing is wrong, with one import of every kind that may be
SOUND = {
    "__init__.py": "from softtrace.loss import DensityLoss",
    "errors.py": "",
    "graph/edges.py": "from softtrace import errors\nimport torch",
    "model/__init__.py": "",
    "anatomy/__init__.py": "from softtrace.graph import edges",
    "tracing/__init__.py": "",
    "density/__init__.py": "",
    "loss/__init__.py": "from softtrace.loss.term import DensityLoss",
    "loss/term.py": "DensityLoss = 1\ndef late():\n    from ..graph.edges import torch",
    "metrics/plotting.py": "def draw():\n    import matplotlib.figure",
    "lightning/penalty.py": "from lightning.pytorch import Callback",
    "hf/__init__.py": "from softtrace.loss import term",
    "report/page.py": "import jinja2",
    "cli/fit.py": "import lightning\nfrom softtrace.report.page import jinja2",
}

_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "

#: what is built into it, the wall that falls, and what it has to say
BROKEN: dict[str, tuple[dict[str, str], Wall, str]] = {
    "up": (
        {"graph/edges.py": "\nfrom softtrace.loss.term import DensityLoss"}, upward,
        "softtrace/graph/edges.py:2 imports softtrace.loss.term: graph lies below loss",
    ),
    "up, in a function": (
        {"density/curve.py": "class A:\n    def f(self):\n        import softtrace.cli.fit"},
        upward, "curve.py:3 imports softtrace.cli.fit (inside a function): density lies below cli",
    ),
    "up, for types": (
        {"data/__init__.py": f"{_TYPES}from ..graph import edges"}, upward,
        "softtrace/data/__init__.py:3 imports softtrace.graph.edges (for types only): data lies",
    ),
    "up, by its name": (
        {"model/a.py": "from importlib import import_module\nimport_module('softtrace.hf')"},
        upward, "softtrace/model/a.py:2 imports softtrace.hf: model lies below hf",
    ),
    "from the root": (
        {"files.py": "from softtrace.data.blocks import pack", "data/blocks.py": "pack = 1"},
        upward, "softtrace/files.py:1 imports softtrace.data.blocks: the root lies below data",
    ),
    "to the neighbour": (
        {"hf/trainer.py": "from softtrace.lightning import penalty"}, upward,
        "hf/trainer.py:1 imports softtrace.lightning.penalty: hf lies below lightning, or beside",
    ),
    "through the face": (
        {"loss/other.py": "import softtrace"}, upward,
        "softtrace/loss/other.py:1 imports softtrace, the face of the package",
    ),
    "a wing of its own": (
        {"utils/a.py": ""}, upward, "softtrace/utils/ is not on the list of wings",
    ),
    "a circle": (
        {"loss/a.py": "from softtrace.loss.b import c", "loss/b.py": "from . import a\nc = 1"},
        circles,
        "a circle: softtrace/loss/a.py:1 imports softtrace.loss.b; "
        "softtrace/loss/b.py:1 imports softtrace.loss.a",
    ),
    "a circle of three, aside": (
        {
            "model/a.py": "import softtrace.model.b",
            "model/b.py": "def f():\n    import softtrace.model.c",
            "model/c.py": f"{_TYPES}from softtrace.model.a import f",
        },
        circles, "softtrace/model/c.py:3 imports softtrace.model.a (for types only)",
    ),
    "a circle through a wing's own face": (
        {"loss/a.py": "from softtrace.loss import DensityLoss",
         "loss/__init__.py": "from softtrace.loss.a import DensityLoss"}, circles,
        "a circle: softtrace/loss/__init__.py:1 imports softtrace.loss.a; "
        "softtrace/loss/a.py:1 imports softtrace.loss",
    ),
    "Lightning": (
        {"hf/a.py": "def f():\n    from lightning.pytorch import Trainer"}, strangers,
        "softtrace/hf/a.py:2 imports lightning.pytorch (inside a function), which belongs in "
        "lightning, cli.fit",
    ),
    "Lightning, in another command": (
        {"cli/study.py": "import lightning"}, strangers, "softtrace/cli/study.py:1 imports lightn",
    ),
    "Lightning, by its old name": (
        {"lightning/a.py": "import pytorch_lightning as pl"}, strangers,
        "lightning/a.py:1 imports pytorch_lightning, which belongs in no module",
    ),
    "torchmetrics": (
        {"lightning/penalty.py": "import torchmetrics"}, strangers,
        "imports torchmetrics, which belongs in metrics, lightning.monitor",
    ),
    "matplotlib": (
        {"metrics/a.py": "import matplotlib.pyplot"}, strangers,
        "softtrace/metrics/a.py:1 imports matplotlib.pyplot, which belongs in report",
    ),
    "jinja2": (
        {"evaluation/a.py": f"{_TYPES}import jinja2"}, strangers,
        "softtrace/evaluation/a.py:3 imports jinja2 (for types only), which belongs in report",
    ),
    "a full hall": (
        {f"{name}.py": "" for name in "abcdefg"}, crowded,
        "softtrace/ holds 8 modules, allowed are 7: a.py, b.py, c.py, d.py, e.py, errors.py, "
        "f.py, g.py",
    ),
    "a long module": (
        {"loss/a.py": "1\n" * 401}, long_files, "softtrace/loss/a.py: 401 lines, allowed are 400",
    ),
    "a long sheet": (
        {"report/assets/a.css": "\n" * 401}, long_files, "softtrace/report/assets/a.css: 401 lin",
    ),
    "a guest let in": (
        {"tracing/__init__.py": "import jinja2"}, on_its_own,
        "importing softtrace.tracing loads jinja2",
    ),
    "a guest let in by another": (
        {"loss/term.py": "from softtrace.graph import b\nDensityLoss = 1",
         "graph/b.py": "import torchmetrics"}, on_its_own,
        "importing softtrace loads torchmetrics",
    ),
}  # fmt: skip


def built(folder: Path, files: dict[str, str]) -> Path:
    """A package of these files, and beside it stand-ins for the guests."""
    for name, text in {**SOUND, **files}.items():
        path = folder / "softtrace" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text, encoding="utf-8")
    for guest in (*GUESTS, "torch"):
        (folder / f"{guest}.py").touch()
    return folder / "softtrace"


def test_a_sound_house_has_no_complaints(tmp_path: Path) -> None:
    root = built(tmp_path, {})
    assert {wall.__name__: wall(root) for wall in (*READ, on_its_own)} == {
        wall.__name__: [] for wall in (*READ, on_its_own)
    }


@pytest.mark.parametrize("name", BROKEN)
def test_a_wall_that_is_broken_names_the_offender(name: str, tmp_path: Path) -> None:
    files, wall, said = BROKEN[name]
    found = wall(built(tmp_path, files))
    assert len(found) == 1
    assert said in found[0]
