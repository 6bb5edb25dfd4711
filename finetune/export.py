"""Export a run for llama.cpp and Ollama: `python -m finetune.export RUN --to FOLDER`."""

import argparse
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.console import json_output, log_to_stderr, run_command
from finetune.files.find_run import find_run
from finetune.files.output_paths import new_folder
from finetune.model.gguf.llama_cpp import find_quantizer, require_converter
from finetune.model.gguf.modelfile import ollama_name
from finetune.run.exporting import (
    FILE,
    LOGGERS,
    MODELFILE,
    ExportedModel,
    ExportSettings,
    export_run,
)
from finetune.run_arguments import add_merged_arguments, run_parser

FORMATS = ("gguf",)

QUANTIZATIONS = ("q8_0", "q4_k_m")
"""What a file's weights may be quantised to: llama.cpp's names."""


def main() -> None:
    """Read the command line, export, print what to do with the files."""
    arguments = _parse_arguments()
    folder = new_folder("--to", arguments.to)
    settings = _check_settings(arguments)
    run_folder = find_run("RUN", arguments.run)
    log_to_stderr(*LOGGERS)
    with json_output(arguments.json) as print_json:
        exported = export_run(run_folder, folder, settings)
        if arguments.json:
            print_json(exported.to_dict())
        else:
            print("\n".join(_result_lines(exported)))


def _parse_arguments() -> argparse.Namespace:
    parser = run_parser(
        "finetune.export",
        "Export the adapter of a run, merged into its base, for llama.cpp and Ollama.",
        "latest --to exported",
        "latest --to exported --quantize q8_0",
        "latest --to exported --llama-cpp ~/llama.cpp --quantize q4_k_m",
    )
    add_merged_arguments(parser, "model.gguf and Ollama's Modelfile", "float16")
    parser.add_argument(
        "--format",
        default="gguf",
        choices=FORMATS,
        help="format of the model file (default: gguf)",
    )
    parser.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        help="quantise the weights; q4_k_m needs llama.cpp's program llama-quantize",
    )
    parser.add_argument(
        "--llama-cpp",
        metavar="FOLDER",
        help="llama.cpp's folder: its converter writes the file, for any architecture that it has",
    )
    return parser.parse_args()


def _check_settings(arguments: argparse.Namespace) -> ExportSettings:
    """Refuse what is missing of llama.cpp."""
    llama_cpp = None
    if arguments.llama_cpp is not None:
        llama_cpp = require_converter(arguments.llama_cpp)
    quantizer = None
    if arguments.quantize == "q4_k_m":
        quantizer = find_quantizer(llama_cpp, arguments.quantize)
    return ExportSettings(arguments.dtype, arguments.quantize, llama_cpp, quantizer)


def _result_lines(exported: ExportedModel) -> list[str]:
    """What the command prints."""
    file = exported.path / FILE
    size = file.stat().st_size / 1e6
    lines = [f"{file}: {exported.file_type}, {size:.0f} MB"]
    comparison = exported.comparison
    if comparison is None:
        lines.append(
            "not checked: transformers does not read this architecture's files"
        )
    else:
        lines.append(
            f"loaded again: {comparison.divergence:.1e} nats per token from the merged model; "
            f"the adapter changes {exported.merged.effect:.1e}"
        )
    lines.append(
        f"merging and rounding to {exported.merged.dtype}: {exported.merged.verdict}"
    )
    name = ollama_name(exported.path.absolute().name)
    modelfile_path = shlex.quote(os.path.relpath(exported.path / MODELFILE))
    lines.append(
        f"Ollama: ollama create {name} -f {modelfile_path} && ollama run {name}"
    )
    lines.append(f"llama.cpp: {_llama_command(file, exported.template_variables)}")
    return lines


def _llama_command(file: Path, variables: Mapping[str, Any]) -> str:
    """Return the command that serves the file, with the variables of its chat template."""
    command = f"llama-server -m {shlex.quote(os.path.relpath(file))} --jinja"
    if variables:
        text = json.dumps(dict(variables))
        command += f" --chat-template-kwargs {shlex.quote(text)}"
    return command


if __name__ == "__main__":
    run_command(main)
