"""Commands that hand a study's winner on: publish, promote."""

import argparse
import sys
from typing import NoReturn

from finetune.console import log_to_stderr
from finetune.exit_codes import NO_ANSWER
from sweeps.study.find_study import find_search

LOGGERS = ("finetune.sharing", "sweeps.answer", "finetune.run", "finetune.data")
"""Loggers whose lines the commands print."""

# Studies and what is done with them are imported inside the functions: they load Optuna and Jinja,
# which `--help` and a mistake on the command line do not need.


def publish(arguments: argparse.Namespace) -> None:
    """Publish the winner's adapter on the hub, with a card of the study."""
    log_to_stderr(*LOGGERS)
    from finetune.sharing.publication import (
        describe_published,
        find_target,
        published_value,
    )
    from sweeps.answer.publish_hub import best_folder, publish_winner, why_no_answer

    study = find_search(arguments.study)
    reason = why_no_answer(study)
    if reason is not None:
        _end(NO_ANSWER, f"{arguments.study}: {reason}")
    target = find_target(
        best_folder(study),
        arguments.to,
        arguments.private,
        arguments.samples,
        default_name=study.name,
    )
    uploaded = publish_winner(study, target)
    if arguments.json:
        content = published_value(uploaded, target)
        arguments.print_json({"study": study.name, **content})
    else:
        print(describe_published(uploaded))


def _end(exit_code: int, line: str) -> NoReturn:
    """End the command with a line on stderr and an exit code."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(exit_code)
