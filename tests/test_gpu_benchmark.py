"""The benchmark of a GPU runs with a small model, on a CPU too."""

import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_it_prints_a_line_for_each_side_and_number_of_slots() -> None:
    options = (
        "--tiny --sides ours,trl --slots 1,3 --lora all_linear --checkpointing off"
    )
    command = [sys.executable, str(GPU), *options.split(), "--busy"]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| tiny")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [(line[1], line[5]) for line in cells] == [
        ("ours", "1"),
        ("ours", "3"),
        ("trl", "1"),
    ]
    assert all(int(line[6]) > 0 for line in cells)
