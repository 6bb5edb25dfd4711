"""Text from a run's adapter: `python -m finetune.generate RUN --prompt "…"`."""

from finetune.console import command_parser, run_command
from finetune.engine.generation import generate_answers
from finetune.errors import refusal


def main() -> None:
    """Read the command line, load the run, print the answers."""
    parser = command_parser(__doc__ or "")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--prompt", required=True, action="append", help="may be given several times")
    parser.add_argument("--max-new-tokens", type=int, help="tokens of each answer at most (the run's own bounds)")
    parser.add_argument("--max-length", type=int, help="tokens of prompt and answer together at most")
    parser.add_argument("--base", action="store_true", help="answer by the base, without the adapter")
    arguments = parser.parse_args()
    bounds = {"max_new_tokens": arguments.max_new_tokens, "max_length": arguments.max_length}
    for name, bound in bounds.items():
        if bound is not None and bound < 1:
            raise refusal(f"--{name.replace('_', '-')}", bound, "must be at least 1")
    from finetune.run.load import load_run

    trained = load_run(arguments.run)
    config = trained.config
    if not any(bounds.values()):
        bounds = {"max_new_tokens": config.sample_max_new_tokens, "max_length": config.sample_max_length}
    model = trained.base if arguments.base else trained.with_adapter()
    for text in generate_answers(model, trained.tokenizer, arguments.prompt, config.quantization, **bounds):
        print(text)


if __name__ == "__main__":
    run_command(main)
