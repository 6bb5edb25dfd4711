"""Generate text with the adapter of a run: `python -m finetune.generate RUN --prompt "…"`."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from finetune.console import command_parser, log_to_stderr, run_command
from finetune.data.types import Prompt
from finetune.engine.generation import generate_answers
from finetune.errors import refusal
from finetune.files.find_run import RUN_HELP, find_run
from finetune.run.load import load_run

log = logging.getLogger(__name__)

LOGGERS = (__name__, "finetune.run.load")
"""Loggers whose lines the command prints."""


def main() -> None:
    """Read the command line, load the run, print an answer to each prompt."""
    arguments = _parse_arguments()
    log_to_stderr(*LOGGERS)
    answers = answer_prompts(
        find_run("RUN", arguments.run),
        [Prompt(text, arguments.system) for text in arguments.prompt],
        base=arguments.base,
        max_new_tokens=arguments.max_new_tokens,
        max_length=arguments.max_length,
    )
    for answer in answers:
        print(answer)


def _parse_arguments() -> argparse.Namespace:
    parser = command_parser(
        "finetune.generate",
        "Generate text with the adapter of a run.",
        'latest --prompt "What does math.gcd do in Python?"',
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        required=True,
        action="append",
        help="a prompt; repeat the flag for several",
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="the system turn before each prompt (default: none)",
    )
    parser.add_argument(
        "--max-new-tokens",
        metavar="TOKENS",
        type=int,
        help="limit of each answer (default: the limits of the run's samples)",
    )
    parser.add_argument(
        "--max-length",
        metavar="TOKENS",
        type=int,
        help="limit of a prompt and its answer together",
    )
    parser.add_argument(
        "--base", action="store_true", help="answer without the adapter"
    )
    arguments = parser.parse_args()
    require_positive("--max-new-tokens", arguments.max_new_tokens)
    require_positive("--max-length", arguments.max_length)
    return arguments


def require_positive(key: str, limit: int | None) -> None:
    """Refuse a limit below 1.

    Args:
        key: the name of the limit, for the error.
        limit: the limit; None: there is none.
    """
    if limit is not None and limit < 1:
        raise refusal(key, limit, "must be at least 1")


def answer_prompts(
    folder: Path,
    prompts: Sequence[Prompt],
    *,
    base: bool = False,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
) -> list[str]:
    """Load a run, and return its answers in the order of the prompts.

    Args:
        folder: the run folder.
        prompts: the prompts.
        base: whether the base answers, without the adapter.
        max_new_tokens: limit of each answer.
        max_length: limit of a prompt and its answer together. Without either limit, those of the
            run's samples hold.

    Raises:
        ConfigError: the run has no adapter.
    """
    run = load_run(folder)
    if max_new_tokens is None and max_length is None:
        max_new_tokens = run.config.sample_max_new_tokens
        max_length = run.config.sample_max_length
    model = run.base if base else run.with_adapter()
    count = len(prompts)
    log.info("answering %s", "the prompt" if count == 1 else f"{count} prompts")
    return generate_answers(
        model,
        run.tokenizer,
        prompts,
        run.config.quantization,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        variables=run.config.model.template_kwargs,
    )


if __name__ == "__main__":
    run_command(main)
