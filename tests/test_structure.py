"""The shape of the code: no circle of imports, no private name across files, small functions, files and folders.

lint-imports (`make lint`) holds the order of the layers; here is what it cannot express. Each check reads the files
below a root, and the second half of this file shows, on small trees, that each one finds what it looks for.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from places import ROOT

PACKAGES = ("dice_py", "cli")
ALL = (*PACKAGES, "tests", "benches", "examples")
FACADE = "dice_py/__init__.py"
"""It lists the public names and imports them when they are asked for: no dependency of the files below it."""
NATIVE = "_native"
"""The compiled module. Its name is private to users of the package, not to the package."""
HOOKS_OF_TRL = {"_compute_loss", "_prepare_dataset", "_precompute_ref_logps", "_tokenize_prompts"}
"""Methods of TRL's trainers that training/ and reinforcement/ override: their names are TRL's, and its private ones."""
FUNCTION_LINES, FILE_LINES, FILES_AT_THE_TOP = 60, 400, 8
LONG_FUNCTIONS = {
    "tests/generation/test_engine_vllm.py:sample_and_score": "all that one process with vLLM does, in order",
    "tests/support/mine_oracle.py:expected": "the naive miner, to be read from top to bottom beside the definition",
}
"""`path:name`, and why it is one piece. At most three."""
LONG_FILES = {
    "tests/generation/test_engine_vllm.py": "the one process with vLLM, what it returns, and the tests of that",
}
"""Paths, and why each is one piece. At most two."""


parsed = functools.cache(ast.parse)


def python_files(root: Path, *folders: str) -> dict[str, ast.Module]:
    """Every Python file of the folders, by its path from the root."""
    return {
        str(path.relative_to(root)): parsed(path.read_text(encoding="utf-8"))
        for folder in folders
        for path in sorted((root / folder).rglob("*.py"))
    }


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        yield from run_time_nodes(node)


def imported_modules(tree: ast.Module, modules: set[str]) -> set[str]:
    """Those of `modules` that a file imports, in functions too."""
    names: set[str] = set()
    for node in run_time_nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & modules


def import_circle(root: Path) -> list[str]:
    """The modules of a circle, if there is one."""
    files = {path: tree for path, tree in python_files(root, *PACKAGES).items() if path != FACADE}
    modules = {module_name(path) for path in files}
    graph = {module_name(path): imported_modules(tree, modules) - {module_name(path)} for path, tree in files.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in ("_", NATIVE)


def private_definitions(tree: ast.Module) -> set[str]:
    """Private functions, classes, variables and attributes that a file defines."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in names if is_private(name)}


def private_uses(tree: ast.Module, helpers: set[str]) -> Iterator[tuple[int, str]]:
    """(line, name) of each private name that a file imports from the project, reads from an object, or patches."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in {*PACKAGES, *helpers}:
            yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr", "delattr")):
            # By text: "dice_py.module._name", or an object and "_name".
            texts = [arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            names = [text.rpartition(".")[2] for text in texts]
            yield from ((node.lineno, name) for name in names if is_private(name))


def private_names_across_files(root: Path) -> list[str]:
    """Private names of the project that another file uses. Private names of other packages are not looked at."""
    files = python_files(root, *PACKAGES, "tests", "benches", "examples", "docs")
    helpers = {Path(path).stem for path in files if path.startswith(("tests/support/", "benches/"))}
    defined = {path: private_definitions(tree) for path, tree in files.items()}
    everywhere = set().union(*defined.values())
    return [
        f"{path}:{line}: {name}"
        for path, tree in files.items()
        for line, name in private_uses(tree, helpers)
        if name in everywhere - defined[path] - HOOKS_OF_TRL
    ]


def code_lines(source: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function that hold code: no comment, no docstring, no blank line."""
    body = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(_dedented(body)).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(inner):
            text = inner.body[0]
            lines -= set(range(text.lineno - node.lineno + 1, (text.end_lineno or 0) - node.lineno + 2))
    return len(lines)


def _dedented(source: str) -> str:
    """The source with the indent of its first line taken from every line that has it."""
    indent = len(source) - len(source.lstrip(" "))
    return "\n".join(line[indent:] if line[:indent].isspace() else line for line in source.split("\n")) + "\n"


def long_functions(root: Path) -> list[str]:
    """Functions over 60 lines of code, as `path:name`."""
    return [
        f"{path}:{node.name}"
        for path, tree in python_files(root, *ALL).items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= FUNCTION_LINES
        and code_lines((root / path).read_text(encoding="utf-8"), node) > FUNCTION_LINES
    ]


def long_files(root: Path) -> list[str]:
    """Files over 400 lines."""
    paths = python_files(root, *ALL)
    return [path for path in paths if len((root / path).read_text(encoding="utf-8").splitlines()) > FILE_LINES]


def files_at_the_top(root: Path) -> list[str]:
    """The files of dice_py/ itself; what is built there does not count."""
    return sorted(path.name for path in (root / "dice_py").iterdir() if path.is_file() and path.suffix != ".so")


def filled_inits(root: Path) -> list[str]:
    """`__init__.py` files below a package's top that hold something."""
    paths = (path for package in PACKAGES for path in sorted((root / package).glob("*/**/__init__.py")))
    return [str(path.relative_to(root)) for path in paths if path.read_text(encoding="utf-8").strip()]


def test_no_circle_of_imports() -> None:
    assert import_circle(ROOT) == []


def test_no_private_name_across_files() -> None:
    assert private_names_across_files(ROOT) == []


def test_functions_and_files_are_short() -> None:
    assert sorted(long_functions(ROOT)) == sorted(LONG_FUNCTIONS)
    assert sorted(long_files(ROOT)) == sorted(LONG_FILES)
    assert len(LONG_FUNCTIONS) <= 3
    assert len(LONG_FILES) <= 2
    assert all([*LONG_FUNCTIONS.values(), *LONG_FILES.values()])


def test_few_files_at_the_top_and_empty_inits() -> None:
    assert len(files_at_the_top(ROOT)) <= FILES_AT_THE_TOP
    assert filled_inits(ROOT) == []


def test_no_script_has_the_name_of_a_module_of_python() -> None:
    """Their folders are on PYTHONPATH of processes that tests and the GPU check start, before Python's own library."""
    folders = ("benches", "benches/gpu", "tests/support")
    names = {file.stem for folder in folders for file in (ROOT / folder).glob("*.py")}
    assert names & sys.stdlib_module_names == set()


# --- the checks find what they look for ------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """Writes files, by their paths, into a new root."""

    def write(**sources: str) -> Path:
        for path, source in sources.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        return tmp_path

    return write


def test_a_circle_is_found(tree: Callable[..., Path]) -> None:
    files = {
        "dice_py/__init__.py": "from dice_py.a import f",
        "dice_py/a.py": "from dice_py.sub import b",
        "dice_py/sub/b.py": "import dice_py.c",
        "dice_py/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dice_py.a import f",
    }
    assert import_circle(tree(**files)) == []
    root = tree(**{"dice_py/c.py": "def f():\n    from dice_py.a import f"})
    assert set(import_circle(root)) == {"dice_py.a", "dice_py.sub.b", "dice_py.c"}


@pytest.mark.parametrize(
    "use",
    [
        "from dice_py.a import _f",
        "from dice_py import a\na._f()",
        "def test(thing):\n    thing._kept",
        "def test(monkeypatch):\n    monkeypatch.setattr('dice_py.a._f', None)",
        "def test(monkeypatch, a):\n    monkeypatch.setattr(a, '_f', None)",
        "from helper import _g",
    ],
)
@pytest.mark.parametrize("path", ["dice_py/sub/b.py", "cli/b.py", "tests/sub/test_b.py"])
def test_a_private_name_across_files_is_found(tree: Callable[..., Path], path: str, use: str) -> None:
    defining = "class Thing:\n    def __init__(self):\n        self._kept = 1\n\ndef _f():\n    Thing()._kept"
    root = tree(**{"dice_py/a.py": defining, "tests/support/helper.py": "_g = 1", path: "import torch\ntorch._C"})
    assert private_names_across_files(root) == []
    (found,) = private_names_across_files(tree(**{path: use}))
    assert found.startswith(f"{path}:")


def test_a_long_function_and_a_long_file_are_found(tree: Callable[..., Path]) -> None:
    body = '    """Docs.\n\n    More.\n    """\n    # Why.\n\n' + "    x = 1\n" * 59
    root = tree(**{"dice_py/a.py": f"class A:\n    @cached\n    def f(self):\n{_indented(body)}"})
    assert long_functions(root) == []
    root = tree(**{"cli/b.py": f"async def g():\n{body}    text = '''a\nb'''\n"})
    assert long_functions(root) == ["cli/b.py:g"]
    assert long_files(root) == []
    assert long_files(tree(**{"dice_py/sub/c.py": "\n" * 401})) == ["dice_py/sub/c.py"]


def _indented(source: str) -> str:
    return re.sub(r"^(?=.)", "    ", source, flags=re.M)


def test_files_at_the_top_and_filled_inits_are_found(tree: Callable[..., Path]) -> None:
    root = tree(**{"dice_py/__init__.py": "x = 1", "dice_py/native.so": "", "dice_py/sub/__init__.py": ""})
    assert files_at_the_top(root) == ["__init__.py"]
    assert filled_inits(root) == []
    root = tree(**{"dice_py/sub/deep/__init__.py": "from dice_py.sub import a"})
    assert filled_inits(root) == ["dice_py/sub/deep/__init__.py"]
