"""docs/python.md runs as it stands, on a tiny base. The notebook runs on the packaged one."""

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.slow
def test_the_blocks_of_the_page_run(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = f'"tracker=none", "model.name_or_path={tiny_base}"'
    text = (DOCS / "python.md").read_text().replace('"tracker=none"', words)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)

    assert len(names["frame"]) > 2
    assert len(names["trials"]) == 2
    assert names["again"].status == "completed"
    assert names["again"].config.lora == names["best"].config.lora
    assert len(names["answers"]) == 1
