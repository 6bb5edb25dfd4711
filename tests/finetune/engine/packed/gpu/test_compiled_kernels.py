"""Every kernel compiles for every card, and fits into its shared memory, though none is here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import support
from support.matrix import further

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
"""Most bytes of a program, by compute capability (CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability")."""

SCRIPT = Path(support.__file__).with_name("compile_kernels.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    "capabilities",
    [
        # The products of 80, 86 and 89 are the same instructions; 89 has the least memory.
        (89, 90),
        *further(((80, 86),)),
    ],
)
@pytest.mark.parametrize(
    ("kernels", "head_dim", "count"),
    [
        ("kernel", 256, 25),
        # The others do not depend on the heads.
        ("attention", 128, 3),
        *further(*(("attention", head_dim, 3) for head_dim in (64, 96, 512))),
    ],
)
def test_every_kernel_fits_every_card(
    kernels: str,
    head_dim: int,
    count: int,
    capabilities: tuple[int, ...],
    tmp_path: Path,
) -> None:
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    # The kernels are compiled, not interpreted.
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), kernels, str(head_dim)]
    command += map(str, capabilities)
    result = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len({line["kernel"] for line in lines}) == count
    assert {line["capability"] for line in lines} == set(capabilities)
    for line in lines:
        assert line["shared"] <= SHARED_MEMORY[line["capability"]], line
