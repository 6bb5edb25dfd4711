"""Generate text with the adapter of a run: `python -m finetune.generate RUN --prompt "…"`."""

import argparse
import logging

from finetune.console import command_parser, log_to_stderr, run_command
from finetune.data.types import Prompt
from finetune.engine.generation import generate_answers
from finetune.errors import refusal
from finetune.files.find_run import RUN_HELP, find_run
from finetune.run.load import load_run

log = logging.getLogger(__name__)


def main() -> None:
    """Read the command line, load the run, print an answer to each prompt."""
    arguments = _parse_arguments()
    log_to_stderr(__name__, "finetune.run.load")
    for answer in _generate(arguments):
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
    _require_positive("--max-new-tokens", arguments.max_new_tokens)
    _require_positive("--max-length", arguments.max_length)
    return arguments


def _require_positive(flag: str, limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise refusal(flag, limit, "must be at least 1")


def _generate(arguments: argparse.Namespace) -> list[str]:
    """Return the answers in the order of the prompts."""
    run = load_run(find_run("RUN", arguments.run))
    max_new_tokens = arguments.max_new_tokens
    max_length = arguments.max_length
    if max_new_tokens is None and max_length is None:
        max_new_tokens = run.config.sample_max_new_tokens
        max_length = run.config.sample_max_length
    model = run.base if arguments.base else run.with_adapter()
    prompts = [Prompt(text, arguments.system) for text in arguments.prompt]
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
