"""A run's metrics on other data, beside its base's: `python -m finetune.evaluate RUN --data test.jsonl`."""

import dataclasses
import logging

from finetune.console import command_parser, run_command

DATA_HELP = "a .jsonl .json .csv .parquet file, a hub id, or a folder: its test files, all files if none is named test"


def main() -> None:
    """Read the command line, measure base and adapter on the rows, print both."""
    parser = command_parser(__doc__ or "")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--data", required=True, help=DATA_HELP)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("finetune.data").setLevel(logging.INFO)  # which files of a folder, and which rows are left out
    from finetune.data.rows import load_all_rows
    from finetune.data.tokens import tokenize
    from finetune.run.load import load_run, read_run_config

    config = read_run_config(arguments.run)
    settings = dataclasses.replace(config.dataset, path=arguments.data, packing=False)
    rows = load_all_rows("--data", settings)
    from finetune.engine.evaluation import evaluate

    trained = load_run(arguments.run)
    tokens = tokenize("test", rows, trained.tokenizer, settings)
    batch = config.trainer.per_device_eval_batch_size
    base = evaluate(trained.base, tokens, batch, config.quantization)
    adapter = evaluate(trained.with_adapter(), tokens, batch, config.quantization)
    print(f"{len(tokens)} rows, {adapter.tokens} answer tokens of {arguments.data}")
    print(f"{'':12}{'base':>10}{'adapter':>10}{'change':>10}")
    for name in ("loss", "perplexity", "accuracy"):
        before, after = getattr(base, name), getattr(adapter, name)
        print(f"{name:12}{before:10.4f}{after:10.4f}{(after / before - 1) if before else 0:+10.1%}")


if __name__ == "__main__":
    run_command(main)
