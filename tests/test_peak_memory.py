"""The peak memory that benchmarks give is the command's."""

import sys

from support.scripts import load_script

from finetune.config.paths import CONF


def test_a_large_parent_does_not_count() -> None:
    script = load_script(CONF.parent / "benchmarks" / "peak_memory.py")
    size = 300 * 2**20
    large = bytearray(b"1") * size

    code, idle = script.run_and_measure([sys.executable, "-c", "pass"])
    assert code == 0
    assert idle < size / 3
    del large

    fill = f"bytearray(b'1') * {size}"
    code, filled = script.run_and_measure([sys.executable, "-c", fill])
    assert code == 0
    assert size < filled < 1.3 * size


def test_a_failure_is_given_back() -> None:
    script = load_script(CONF.parent / "benchmarks" / "peak_memory.py")
    assert script.run_and_measure([sys.executable, "-c", "exit(7)"])[0] == 7
