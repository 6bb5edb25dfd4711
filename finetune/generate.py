"""Generate text with the adapter of a run: `python -m finetune.generate RUN --prompt "…"`.

`--prompts FILE` answers those of a file, `--chat` questions on the terminal, each with what was
said before.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.schema import RunConfig
from finetune.console import json_output, log_to_stderr, run_command
from finetune.data.encoding import Encoder
from finetune.data.prompt_file import STANDARD_INPUT, read_prompts
from finetune.data.types import Prompt
from finetune.engine.encoded_prompts import Sampling
from finetune.engine.generation import generate_answers
from finetune.engine.text_stream import TextStream
from finetune.errors import ConfigError
from finetune.files.find_run import find_run
from finetune.generation_arguments import (
    check_sampling,
    require_positive,
    require_text,
)
from finetune.run.chat import Chat, chat_on_terminal
from finetune.run.load import TrainedRun, load_run
from finetune.run_arguments import run_parser

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

LOGGERS = (__name__, "finetune.run.load")
"""Loggers whose lines the command prints."""

CHAT_TOKENS = 512
"""Limit of an answer in a chat, in tokens; the run's limits are those of short samples."""


def main() -> None:
    """Read the command line, load the run, answer the prompts or chat."""
    arguments = _parse_arguments()
    log_to_stderr(*LOGGERS)
    with json_output(arguments.json) as print_json:
        if arguments.chat:
            _chat(arguments)
            return
        # Before the base is loaded.
        prompts = _prompts(arguments)
        is_streamed = len(prompts) == 1 and not arguments.json
        answers = answer_prompts(
            find_run("RUN", arguments.run),
            prompts,
            base=arguments.base,
            max_new_tokens=arguments.max_new_tokens,
            max_length=arguments.max_length,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
            show=_print_piece if is_streamed else None,
        )
        if arguments.json:
            print_json({"answers": _rows(prompts, answers)})
        elif is_streamed:
            print()
        else:
            for answer in answers:
                print(answer)


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _parse_arguments() -> argparse.Namespace:
    parser = run_parser(
        "finetune.generate",
        "Generate text with the adapter of a run.",
        'latest --prompt "What does math.gcd do in Python?"',
        "latest --chat --temperature 0.7",
        "latest --prompts questions.jsonl --json",
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        help="a prompt; repeat the flag for several",
    )
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help="a file with one prompt a line, or JSON lines with prompt or messages "
        f"(FILE.jsonl); {STANDARD_INPUT}: standard input",
    )
    prompts.add_argument(
        "--chat", action="store_true", help="chat on the terminal; Ctrl-D ends it"
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
        help="limit of each answer (default: the limits of the run's samples; "
        f"in a chat {CHAT_TOKENS})",
    )
    parser.add_argument(
        "--max-length",
        metavar="TOKENS",
        type=int,
        help="limit of a prompt and its answer together",
    )
    _add_sampling(parser)
    parser.add_argument(
        "--base", action="store_true", help="answer without the adapter"
    )
    arguments = parser.parse_args()
    require_positive("--max-new-tokens", arguments.max_new_tokens)
    require_positive("--max-length", arguments.max_length)
    check_sampling(
        arguments.temperature,
        arguments.top_p,
        arguments.seed,
        key=lambda name: f"--{name.replace('_', '-')}",
    )
    for text in arguments.prompt or ():
        require_text("--prompt", text)
    if arguments.system is not None:
        require_text("--system", arguments.system)
    if arguments.chat and arguments.json:
        raise ConfigError("argument --json: not allowed with argument --chat")
    if arguments.chat and sys.stdin is None:
        raise ConfigError("--chat: standard input is closed")
    return arguments


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="tokens are drawn, with logits divided by T "
        "(default: 0, each token is the most likely one)",
    )
    parser.add_argument(
        "--top-p",
        metavar="SHARE",
        type=float,
        help="draw from the likeliest tokens that have this share together (default: 1)",
    )
    parser.add_argument(
        "--seed", type=int, help="seed of drawn tokens (default: the run's)"
    )


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    if arguments.prompts is not None:
        return read_prompts("--prompts", arguments.prompts, arguments.system)
    return [Prompt(text, arguments.system) for text in arguments.prompt]


def answer_prompts(
    folder: Path,
    prompts: Sequence[Prompt],
    *,
    base: bool = False,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: int | None = None,
    show: Callable[[str], None] | None = None,
) -> list[str]:
    """Load a run, and return its answers in the order of the prompts.

    Args:
        folder: the run folder.
        prompts: the prompts.
        base: whether the base answers, without the adapter.
        max_new_tokens: limit of each answer.
        max_length: limit of a prompt and its answer together. Without either limit, those of the
            run's samples hold.
        temperature: see `_sampling`.
        top_p: see `_sampling`.
        seed: see `_sampling`.
        show: receives the only prompt's answer piece by piece, as it is generated.

    Raises:
        ConfigError: the run has no adapter, or the chat template refuses a prompt.
    """

    def check(config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
        encoder = Encoder(tokenizer, config.model.template_kwargs)
        for prompt in prompts:
            encoder.encode_prompt(prompt)

    run = load_run(folder, check)
    if max_new_tokens is None and max_length is None:
        max_new_tokens = run.config.sample_max_new_tokens
        max_length = run.config.sample_max_length
    model = run.base if base else run.with_adapter()
    count = len(prompts)
    log.info("answering %s", "the prompt" if count == 1 else f"{count} prompts")
    stream = None if show is None else TextStream(run.tokenizer, show)
    answers = generate_answers(
        model,
        run.tokenizer,
        prompts,
        run.config.quantization,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        variables=run.config.model.template_kwargs,
        sampling=_sampling(run, temperature, top_p, seed),
        show_tokens=None if stream is None else stream.add,
    )
    if stream is not None:
        (answer,) = answers
        stream.finish(answer)
    return answers


def _sampling(
    run: TrainedRun, temperature: float, top_p: float | None, seed: int | None
) -> Sampling | None:
    """Return how tokens are drawn; None: each token is the most likely one.

    Args:
        run: the run.
        temperature: 0: the most likely tokens.
        top_p: the share of the likeliest tokens; None: all.
        seed: the seed; None: the run's.
    """
    if temperature == 0:
        return None
    share = 1.0 if top_p is None else top_p
    return Sampling(temperature, share, run.config.seed if seed is None else seed)


def _rows(prompts: list[Prompt], answers: list[str]) -> list[dict[str, Any]]:
    """Return prompts and answers as `--json` prints them."""
    rows: list[dict[str, Any]] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        question = prompt.messages or prompt.text
        rows.append({"prompt": question, "system": prompt.system, "answer": answer})
    return rows


def _chat(arguments: argparse.Namespace) -> None:
    def check(config: RunConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
        if tokenizer.chat_template is None:
            base = config.model.name_or_path
            reason = f"{base} has no chat template; --prompt TEXT continues a text"
            raise ConfigError(f"--chat: {reason}")
        # Some templates refuse system turns.
        question = Prompt("Hi", arguments.system)
        Encoder(tokenizer, config.model.template_kwargs).encode_prompt(question)

    run = load_run(find_run("RUN", arguments.run), check)
    max_new_tokens = arguments.max_new_tokens
    if max_new_tokens is None and arguments.max_length is None:
        max_new_tokens = CHAT_TOKENS
    chat = Chat(
        run,
        run.base if arguments.base else run.with_adapter(),
        arguments.system,
        _sampling(run, arguments.temperature, arguments.top_p, arguments.seed),
        max_new_tokens,
        arguments.max_length,
    )
    chat_on_terminal(chat)


if __name__ == "__main__":
    run_command(main)
