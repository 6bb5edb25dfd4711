"""The layers of the packages: imports go one way, and what starts fast loads nothing heavy.

The order is the list `LAYERS` below, the highest first. A module imports only from its own layer or from a lower one,
wherever the import stands: at the top, inside a function, or for types alone.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

COMMANDS = ("__main__", "evaluate", "generate", "merge", "plan")

LAYERS = (
    ("sweeps.sweeper", "sweeps.launcher", "sweeps.__main__"),
    ("sweeps.answer",),
    ("sweeps.study",),
    ("sweeps.space",),
    ("sweeps.compat",),
    tuple(f"finetune.{name}" for name in COMMANDS),
    ("finetune.run",),
    ("finetune.engine",),
    ("finetune.model",),
    ("finetune.app",),
    ("finetune.tracking",),
    ("finetune.data",),
    ("finetune.files",),
    ("finetune.console",),
    ("finetune.config",),
    ("finetune.compat",),
    ("finetune.errors",),
)

LIGHT = (
    "finetune.app", "finetune.tracking", "finetune.data", "finetune.files", "finetune.console",
    "finetune.config", "finetune.compat", "finetune.errors", "finetune.run.run", "finetune.run.job",
    "sweeps.sweeper", "sweeps.launcher", "sweeps.__main__", "sweeps.space", *LAYERS[5],
)  # fmt: skip
"""Modules, and packages with all their modules, that load no torch when they are imported."""

HEAVY = {
    "accelerate", "bitsandbytes", "datasets", "huggingface_hub", "hydra_plugins", "jinja2", "numpy", "optuna",
    "peft", "plotly", "psutil", "pyarrow", "rich", "safetensors", "scipy", "sklearn", "sqlalchemy", "torch",
    "tqdm", "transformers", "triton", "trl", "wandb", "wandb_workspaces",
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


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of both packages, parsed."""
    paths = [path for package in ("finetune", "sweeps") for path in (ROOT / package).rglob("*.py")]
    return {module_name(path): ast.parse(path.read_text()) for path in paths}


def walk(node: ast.AST, in_function: bool = False, for_types: bool = False) -> Iterator[tuple[ast.stmt, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, in_function, for_types
        inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        types = for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
        yield from walk(child, inside, types)


@cache
def imports() -> tuple[Import, ...]:
    found = []
    for source, tree in modules().items():
        for node, in_function, for_types in walk(tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                assert isinstance(node, ast.ImportFrom)
                assert node.level == 0, f"{source}:{node.lineno}: a relative import"
                module = str(node.module)
                names = [f"{module}.{alias.name}" for alias in node.names]
                targets = list(dict.fromkeys(name if name in modules() else module for name in names))
            found += [Import(source, target, node.lineno, in_function, for_types) for target in targets]
    return tuple(found)


def layer_of(module: str) -> int | None:
    for number, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return number
    return None


def is_light(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in LIGHT)


@cache
def loads(module: str) -> frozenset[str]:
    """The heavy packages that importing a module loads, by the statements at the top of it and of what it imports."""
    seen: set[str] = set()
    heavy: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in modules():
            tops = [i.target for i in imports() if i.source == current and not i.in_function and not i.for_types]
            parents = [current.rsplit(".", count)[0] for count in range(1, current.count(".") + 1)]
            waiting += [*tops, *parents]
        elif current.split(".")[0] in HEAVY:
            heavy.add(current.split(".")[0])
    return frozenset(heavy)


def test_every_module_has_a_layer() -> None:
    without = [m for m in modules() if layer_of(m) is None and m not in ("finetune", "sweeps")]
    assert not without


def test_imports_go_down_the_list_of_layers() -> None:
    upward = []
    for found in imports():
        above, below = layer_of(found.source), layer_of(found.target)
        if above is not None and below is not None and below < above:
            upward.append(f"{found.source}:{found.line} imports {found.target}")
    assert not upward


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {i.target for i in imports() if i.source == module and i.target in modules()} for module in modules()
    }

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [*graph[start]]
        while waiting:
            current = waiting.pop()
            if current not in seen:
                seen.add(current)
                waiting += graph[current]
        return seen

    circles = [module for module in modules() if module in reachable(module)]
    assert not circles


def test_light_modules_load_no_torch() -> None:
    """Each one alone: what another one has loaded does not excuse it."""
    light = sorted(module for module in modules() if is_light(module))
    guilty = [module for module in light if "torch" in loads(module)]
    assert not guilty
    code = (
        "import importlib, sys\n"
        f"for name in {light!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules or 'transformers' in sys.modules: sys.exit(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
