"""Text from a run's adapter: `python -m finetune.generate RUN --prompt "…"`."""

from finetune.console import command_parser, run_command
from finetune.engine.generation import generate_answers
from finetune.errors import refusal


def main() -> None:
    """Read the command line, load the run, print the answers."""
    parser = command_parser(__doc__ or "")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--prompt", required=True, action="append", help="may be given several times")
    parser.add_argument("--max-length", type=int, help="tokens of prompt and answer together (the run's own)")
    parser.add_argument("--base", action="store_true", help="answer by the base, without the adapter")
    arguments = parser.parse_args()
    if arguments.max_length is not None and arguments.max_length < 1:
        raise refusal("--max-length", arguments.max_length, "must be at least 1")
    from finetune.run.load import load_run

    trained = load_run(arguments.run)
    length = arguments.max_length or trained.config.sample_max_length
    model = trained.base if arguments.base else trained.with_adapter()
    for text in generate_answers(model, trained.tokenizer, arguments.prompt, length, trained.config.quantization):
        print(text)


if __name__ == "__main__":
    run_command(main)
