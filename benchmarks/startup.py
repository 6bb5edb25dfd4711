"""What this project's start costs over a bare Hydra application, in turns.

    python benchmarks/startup.py [--pairs 15]

Both compose their config and print it, or refuse it; no model is involved. Read the difference of
the medians.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BARE = """
import hydra

@hydra.main(config_path=".", config_name="config")
def main(config):
    pass

main()
"""


def main() -> None:
    """Time the commands in turns and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=15)
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.yaml").write_text("lora:\n  r: 16\n")
        (folder / "app.py").write_text(BARE)
        print("| | ours, s | bare Hydra, s | difference, s |\n|---|---|---|---|")
        for name, words in (
            ("--help", ["--help"]),
            ("--cfg job", ["--cfg", "job"]),
            ("a config error", ["lora.rr=3"]),
        ):
            ours, bare = [], []
            for _ in range(pairs):
                ours.append(seconds([sys.executable, "-m", "finetune", *words], folder))
                bare.append(seconds([sys.executable, "app.py", *words], folder))
            medians = statistics.median(ours), statistics.median(bare)
            print(
                f"| {name} | {medians[0]:.2f} | {medians[1]:.2f} | {medians[0] - medians[1]:+.2f} |"
            )


def seconds(command: list[str], folder: Path) -> float:
    """Wall time of a command."""
    start = time.perf_counter()
    subprocess.run(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
