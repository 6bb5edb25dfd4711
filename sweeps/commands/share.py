"""Commands that hand a study's winner on: publish, promote."""

import argparse
import sys
from typing import NoReturn

from finetune.console import log_to_stderr
from finetune.exit_codes import GATE_NOT_MET, NO_ANSWER
from sweeps.study.find_study import find_search

LOGGERS = ("finetune.sharing", "sweeps.answer", "finetune.run", "finetune.data")
"""Loggers whose lines the commands print."""

REGISTRIES = ("wandb", "mlflow", "hub")
"""Where a winner may be registered."""

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


def promote(arguments: argparse.Namespace) -> None:
    """Compare the winner with the deployed adapter, and register it if it is better."""
    log_to_stderr(*LOGGERS)
    from sweeps.answer.gate import Gate
    from sweeps.answer.promotion import Request, check_request, gate_line
    from sweeps.answer.promotion import promote as promote_winner
    from sweeps.answer.publish_hub import why_no_answer

    request = Request(
        against=arguments.against,
        gate=Gate(arguments.data, arguments.metric, arguments.min_gain),
        to=arguments.to,
        alias=arguments.alias,
        name=arguments.name,
    )
    check_request(request)
    study = find_search(arguments.study)
    reason = why_no_answer(study)
    if reason is None and len(study.objectives) > 1:
        reason = "has several objectives, so no single winner"
    if reason is not None:
        _end(NO_ANSWER, f"{arguments.study}: {reason}")
    promotion = promote_winner(study, request)
    if arguments.json:
        arguments.print_json(promotion.to_dict())
    if promotion.is_refused:
        _end(GATE_NOT_MET, f"gate not met: {promotion.reason}")
    if not arguments.json:
        if promotion.verdict is not None:
            print(gate_line(request.gate, promotion.verdict))
        print(promotion.reason)


def _end(exit_code: int, line: str) -> NoReturn:
    """End the command with a line on stderr and an exit code."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(exit_code)
