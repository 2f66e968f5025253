"""The rules of the house that a reader relies on: which package may import which, and how long a module may become."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.order import FIRST

ROOT = Path(__file__).parents[1]
PACKAGES = {"meteora_cli": ROOT / "meteora_cli", "meteora_core": ROOT / "meteora_core", "meteora_kernels": ROOT / "kernels" / "meteora_kernels"}
FORBIDDEN = {
    "meteora_cli": set(),
    "meteora_core": {"meteora_cli", "typer", "rich", "click"},
    "meteora_kernels": {"meteora_cli", "meteora_core", "typer", "rich", "click", "transformers", "peft"},
}
ROOMS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "text tensors errors reading locks files json_files file_models tensor_files archives names ranges memory progress workers environment "
        "unexpected hooks choices settings settings_file",
        "fetch",
        "data",
        "adapters",
        "routing",
        "model fused",
        "checkpoints",
        "exports",
        "generation",
        "trace",
        "evaluation",
        "training",
        "living",
        "routers",
        "bench integrations starter",
        "chat quickstart",
        "serving",
        "__init__",
    )
)
"""The modules and packages of meteora_core from the bottom to the top; each imports from its own row and the rows before it, never from later ones."""
LONGEST = 500
MOST_PARAMETERS = 8
KEPT_LONG = {"meteora_core/integrations/lm_eval.py:__init__"}
"""Functions whose parameters another program names: lm-evaluation-harness passes what the user writes in ``--model_args``."""


def modules(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def imported(module: Path) -> Iterator[tuple[str, int]]:
    """The top-level package of every import in a module, those inside functions included, and its line."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0], node.lineno


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_imports_run_from_the_command_line_to_the_library_to_the_kernels(package: str) -> None:
    found = [
        f"{module.relative_to(ROOT)}:{line} imports {name}" for module in modules(package) for name, line in imported(module) if name in FORBIDDEN[package]
    ]
    assert modules(package)
    assert not found


def core_arrows() -> dict[str, set[str]]:
    """Module -> modules, for every import inside meteora_core (in functions and for type checkers too), without the package's own name."""
    paths = {".".join(path.relative_to(PACKAGES["meteora_core"]).with_suffix("").parts).removesuffix(".__init__"): path for path in modules("meteora_core")}
    arrows: dict[str, set[str]] = {}
    for name, path in paths.items():
        arrows[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno} imports relatively"
                wanted = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                wanted = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for full in wanted:
                package, _, inside = full.partition(".")
                target = inside if inside in paths else inside.rpartition(".")[0] or "__init__"
                if package == "meteora_core" and inside != "__version__" and target != name:
                    arrows[name].add(target)
    return arrows


def test_the_core_imports_only_from_lower_rooms() -> None:
    height = {room: row for row, rooms in enumerate(ROOMS) for room in rooms}
    arrows = core_arrows()
    rooms = {name: name.partition(".")[0] for name in arrows}
    assert sorted(set(rooms.values()) - set(height)) == [], "a new room needs its place in ROOMS"
    climbing = {
        f"{rooms[name]} -> {rooms[target]}": f"{name} imports {target}"
        for name in arrows
        for target in arrows[name]
        if height[rooms[target]] > height[rooms[name]]
    }
    assert [climbing[arrow] for arrow in sorted(climbing)] == []


def test_no_modules_of_the_core_import_one_another() -> None:
    arrows = core_arrows()
    reached: dict[str, set[str]] = {}
    for start in arrows:
        seen, ahead = set(), list(arrows[start])
        while ahead:
            if (name := ahead.pop()) not in seen:
                seen.add(name)
                ahead += arrows[name]
        reached[start] = seen
    circles = {frozenset(other for other in reached[name] if name in reached[other]) for name in arrows if name in reached[name]}
    assert [sorted(circle) for circle in circles] == []


def test_the_library_never_prints_and_never_exits() -> None:
    found = []
    for module in modules("meteora_core"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.exit", "exit", "quit", "os._exit"):
                found.append(f"{module.relative_to(ROOT)}:{node.lineno} calls {ast.unparse(node.func)}")
    allowed = {module for module in found if "/integrations/" in module}  # entry points of other programs
    assert sorted(set(found) - allowed) == []


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_no_module_is_longer_than_500_lines(package: str) -> None:
    lengths = {str(module.relative_to(ROOT)): len(module.read_text(encoding="utf-8").splitlines()) for module in modules(package)}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_no_function_has_more_than_eight_parameters() -> None:
    """But for those that run on a GPU, whose parameters Triton compiles."""
    found = set()
    for module in modules("meteora_core") + modules("meteora_kernels"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not any("triton.jit" in ast.unparse(mark) for mark in node.decorator_list):
                arguments = node.args
                names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
                others = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
                if len(names) + len(others) - (names[:1] in (["self"], ["cls"])) > MOST_PARAMETERS:
                    found.add(f"{module.relative_to(ROOT)}:{node.name}")
    assert found == KEPT_LONG


def test_dir_and_help_show_the_public_names_before_they_are_used() -> None:
    program = "import sys, meteora_core as m; assert set(m.__all__) <= set(dir(m)); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_no_test_imports_a_test() -> None:
    """What tests share is in ``conftest.py`` or in ``tests/support/``, where a reader looks for it and a test may be renamed without harm."""
    tests = sorted((ROOT / "tests").rglob("*.py"))
    named = {module.stem for module in tests if module.name.startswith("test_") or module.name == "conftest.py"}
    found = []
    for module in tests:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{module.relative_to(ROOT)}:{node.lineno} imports {name}" for name in names if named & set(name.split("."))]
    assert len(named) > 100
    assert not found


def test_helpers_of_tests_are_in_conftest_or_in_support() -> None:
    """``tests/robustness`` is a program of its own."""
    own = ROOT / "tests" / "support", ROOT / "tests" / "robustness"
    others = [module for module in (ROOT / "tests").rglob("*.py") if not module.name.startswith("test_") and module.name != "conftest.py"]
    assert [str(module.relative_to(ROOT)) for module in others if not any(module.is_relative_to(folder) for folder in own)] == []


@pytest.mark.parametrize("package", ["meteora_core", "meteora_kernels"])
def test_every_public_name_has_an_example(package: str) -> None:
    """In its docstring, or in that of one of its methods; pytest runs them (``--doctest-modules``)."""
    module = importlib.import_module(package)
    documented = {name: value for name in module.__all__ if callable(value := getattr(module, name))}
    without = [name for name, value in documented.items() if not any(test.examples for test in doctest.DocTestFinder().find(value, name))]
    assert documented
    assert without == []


def test_the_files_that_go_first_exist() -> None:
    names = [module.name for module in (ROOT / "tests").rglob("test_*.py")]
    assert [name for name in FIRST if names.count(name) != 1] == []


def test_every_test_module_has_a_name_of_its_own() -> None:
    """pytest imports test modules by their names alone, so two of one name are an error on a fresh clone."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
