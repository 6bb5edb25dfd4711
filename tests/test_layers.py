"""The layers of the packages: imports go one way, and light modules load nothing heavy.

The order is the list `LAYERS` below, the highest first. A module imports only from its own layer or
from a lower one, wherever the import stands: at the top, inside a function, or for types alone.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from finetune import commands

ROOT = Path(__file__).resolve().parent.parent

COMMANDS = ("__main__", *commands.COMMANDS)

LAYERS = (
    ("sweeps.api",),
    (
        "sweeps.queued_session",
        "sweeps.sweeper",
        "sweeps.launcher",
        "sweeps.callback",
        "sweeps.__main__",
        "sweeps.commands",
    ),
    ("sweeps.answer",),
    ("sweeps.study",),
    ("sweeps.space",),
    ("sweeps.compat",),
    ("finetune.api",),
    ("finetune.in_process",),
    tuple(f"finetune.{name}" for name in COMMANDS),
    ("finetune.run", "finetune.sharing"),
    ("finetune.engine",),
    ("finetune.model",),
    ("finetune.app", "finetune.run_arguments"),
    ("finetune.job_failures",),
    ("finetune.tracking",),
    ("finetune.notification",),
    ("finetune.metrics",),
    ("finetune.data",),
    ("finetune.files",),
    ("finetune.console",),
    ("finetune.hydra_errors",),
    ("finetune.commands",),
    ("finetune.config",),
    ("finetune.compat",),
    (
        "finetune.generation_arguments",
        "finetune.interrupt_signals",
        "finetune.json_safe",
        "finetune.quantities",
    ),
    ("finetune.errors",),
    ("finetune.exit_codes", "finetune.version"),
)

LIGHT = (
    "finetune.app", "finetune.tracking", "finetune.metrics", "finetune.data", "finetune.files",
    "finetune.notification", "finetune.console", "finetune.hydra_errors", "finetune.commands", "finetune.config",
    "finetune.compat", "finetune.sharing", "finetune.json_safe", "finetune.quantities", "finetune.errors", "finetune.exit_codes", "finetune.run.run", "finetune.run.job",
    "sweeps.sweeper", "sweeps.launcher", "sweeps.queued_session", "sweeps.callback", "sweeps.__main__", "sweeps.commands",
    "sweeps.space",
    "sweeps.answer.report", "sweeps.api", "finetune.api", "finetune.in_process",
    *(f"finetune.{name}" for name in COMMANDS),
)  # fmt: skip
"""Modules, and packages with all their modules, that load no torch when they are imported."""

HEAVY = {
    "accelerate", "bitsandbytes", "charset_normalizer", "datasets", "filelock", "fsspec", "gguf", "huggingface_hub", "hydra", "hydra_plugins",
    "jinja2", "joblib", "lm_eval", "mlflow", "numpy", "omegaconf", "optuna", "pandas", "peft", "plotly", "psutil", "pyarrow", "ray", "rich", "rouge_score",
    "safetensors", "scipy", "sklearn", "sqlalchemy", "submitit", "tensorboard", "torch", "tqdm", "trackio", "transformers", "triton",
    "trl", "wandb", "wandb_workspaces",
}  # fmt: skip
"""Packages that take long to import, or that not every command needs."""


@dataclass(frozen=True)
class Import:
    """One import statement of a module."""

    source: str
    target: str
    line: int
    in_function: bool
    for_types: bool

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of both packages, parsed."""
    paths = [
        path
        for package in ("finetune", "sweeps")
        for path in (ROOT / package).rglob("*.py")
    ]
    return {module_name(path): ast.parse(path.read_text()) for path in paths}


def walk(
    node: ast.AST, in_function: bool = False, for_types: bool = False
) -> Iterator[tuple[ast.stmt, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, in_function, for_types
        is_function = isinstance(
            child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        )
        is_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(
            child.test
        )
        yield from walk(child, in_function or is_function, for_types or is_for_types)


@cache
def imports() -> tuple[Import, ...]:
    statements = []
    for source, tree in modules().items():
        for node, in_function, for_types in walk(tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                assert isinstance(node, ast.ImportFrom)
                assert node.level == 0, f"{source}:{node.lineno}: a relative import"
                module = str(node.module)
                names = [f"{module}.{alias.name}" for alias in node.names]
                targets = [name if name in modules() else module for name in names]
            for target in dict.fromkeys(targets):
                statements.append(
                    Import(source, target, node.lineno, in_function, for_types)
                )
    return tuple(statements)


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    return tuple(statement for statement in imports() if statement.source == module)


def is_in(module: str, names: tuple[str, ...]) -> bool:
    """Whether a module is one of the names, or inside one of them."""
    return any(module == name or module.startswith(f"{name}.") for name in names)


def layer_of(module: str) -> int | None:
    return next(
        (number for number, names in enumerate(LAYERS) if is_in(module, names)), None
    )


@cache
def loads(module: str) -> frozenset[str]:
    """The modules and heavy packages that importing a module loads, through the tops of modules."""
    loaded: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current in modules() and current not in loaded:
            loaded.add(current)
            for statement in imports_of(current):
                if not (statement.in_function or statement.for_types):
                    waiting.append(statement.target)
            waiting += [
                current.rsplit(".", count)[0]
                for count in range(1, current.count(".") + 1)
            ]
        elif current.split(".")[0] in HEAVY:
            loaded.add(current.split(".")[0])
    return frozenset(loaded)


def test_every_module_has_a_layer() -> None:
    without = [
        m for m in modules() if layer_of(m) is None and m not in ("finetune", "sweeps")
    ]
    assert without == []


def test_imports_go_down_the_list_of_layers() -> None:
    upward = []
    for statement in imports():
        source, target = layer_of(statement.source), layer_of(statement.target)
        if source is not None and target is not None and target < source:
            upward.append(str(statement))
    assert upward == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {i.target for i in imports_of(module)} & modules().keys()
        for module in modules()
    }

    def reachable(start: str) -> set[str]:
        reached: set[str] = set()
        waiting = [*graph[start]]
        while waiting:
            current = waiting.pop()
            if current not in reached:
                reached.add(current)
                waiting += graph[current]
        return reached

    circles = [module for module in modules() if module in reachable(module)]
    assert circles == []


def test_imports_inside_functions_only_keep_a_light_module_light() -> None:
    """An import inside a function is of something heavy that the module does not load anyway."""
    needless = []
    for statement in imports():
        if not statement.in_function or statement.for_types:
            continue
        target, source = statement.target, statement.source
        added = loads(target) if target in modules() else {target.split(".")[0]}
        if not (added & HEAVY) - loads(source):
            needless.append(str(statement))
    assert needless == []


@pytest.mark.parametrize(
    "module",
    ["finetune.__main__", "sweeps.sweeper", "sweeps.launcher", "sweeps.callback"],
)
def test_every_start_loads_only_what_composes_a_config(module: str) -> None:
    """Hydra imports its plugins at every start; `--help` and a refused override need no run."""
    needless = [
        name for name in loads(module) if is_in(name, ("finetune.run", "finetune.data"))
    ]
    assert needless == []


def test_light_modules_load_no_torch() -> None:
    """Each one alone, so that it is not excused by what another one has loaded."""
    light = sorted(module for module in modules() if is_in(module, LIGHT))
    guilty = [module for module in light if "torch" in loads(module)]
    assert guilty == []
    code = (
        "import importlib, sys\n"
        f"for name in {light!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules or 'transformers' in sys.modules: sys.exit(name)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["finetune", "sweeps"])
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    assert not loads(package) & HEAVY


@pytest.mark.parametrize("package", ["finetune", "sweeps"])
def test_private_modules_of_other_libraries_are_imported_in_compat_alone(
    package: str,
) -> None:
    guilty = []
    for module, tree in modules().items():
        if module == f"{package}.compat" or not is_in(module, (package,)):
            continue
        for node, _, for_types in walk(tree):
            if for_types or not isinstance(node, ast.ImportFrom):
                continue
            names = [
                *str(node.module).split("."),
                *(alias.name for alias in node.names),
            ]
            is_own = names[0] in ("finetune", "sweeps", "__future__")
            if not is_own and any(name.startswith("_") for name in names):
                guilty.append(f"{module}:{node.lineno} imports {'.'.join(names)}")
    assert guilty == []
