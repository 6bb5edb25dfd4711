"""Tiny base models."""

import json
from pathlib import Path

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def wide_base(tiny_base: Path, folder: Path) -> Path:
    """The tiny base, said to have the shapes of a large one: a plan believes its config."""
    place = folder / "wide"
    place.mkdir()
    for file in tiny_base.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    config = json.loads((place / "config.json").read_text())
    config |= {"num_hidden_layers": 8, "hidden_size": 4096, "intermediate_size": 16384, "head_dim": 1024}
    (place / "config.json").write_text(json.dumps(config))
    return place
