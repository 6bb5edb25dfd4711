"""The command that serves the report of a study while it runs: watch."""

import argparse
import contextlib
import os

from finetune.console import quiet_libraries
from sweeps.study.find_study import find_study

# The report is imported inside the function: it loads Optuna and plotly, which `--help` and a
# mistake on the command line do not need.


def watch(arguments: argparse.Namespace) -> None:
    """Serve the report on this machine until Ctrl-C."""
    study = find_study(arguments.study)
    quiet_libraries(bars=False)
    from sweeps.answer.live_page import LivePage
    from sweeps.answer.page_server import serve

    def announce(address: str) -> None:
        if arguments.json:
            arguments.print_json({"study": study.name, "address": address})
            return
        folder = os.path.relpath(study.folder)
        print(f"{folder} is shown at {address} (Ctrl-C ends this)", flush=True)

    # Ctrl-C is the normal end.
    with contextlib.suppress(KeyboardInterrupt):
        serve(LivePage(study.folder), arguments.port, announce)
