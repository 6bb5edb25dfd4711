"""CONTRIBUTING.md's source tree has every module, and no other."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def listed_modules(text: str) -> set[str]:
    """Paths of the Python files in the tree that CONTRIBUTING.md prints."""
    tree = text.split("```")[1]
    folders: list[tuple[int, str]] = []
    modules = set()
    for line in tree.splitlines():
        match = re.match(r"( *)([\w./]+\.py|[\w/]+/)(?:\s|$)", line)
        if match is None:
            continue
        indent, name = len(match[1]), match[2]
        folders = [folder for folder in folders if folder[0] < indent]
        path = "".join(folder for _, folder in folders) + name
        if name.endswith("/"):
            folders.append((indent, name))
        else:
            modules.add(path)
    return modules


def test_the_source_tree_lists_every_module_and_no_other() -> None:
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in ("finetune", "sweeps")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert listed_modules((ROOT / "CONTRIBUTING.md").read_text()) == modules
