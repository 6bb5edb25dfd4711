"""Export a run for llama.cpp and Ollama: `python -m finetune.export RUN --to FOLDER`.

The adapter is merged into its base as `finetune.merge` does it. The file is written with the
package gguf, or by llama.cpp's own converter (`--llama-cpp`). It counts when transformers has
loaded it again and its predictions are those of the merged model.
"""

import argparse
import json
import logging
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import (
    command_parser,
    json_output,
    log_to_stderr,
    run_command,
)
from finetune.errors import refusal
from finetune.files.atomic import replace_folder, write_text
from finetune.files.find_run import RUN_HELP, find_run
from finetune.merge import (
    DTYPES,
    MergedModel,
    merge_run,
    require_mergeable,
    require_new_folder,
)
from finetune.merge import LOGGERS as MERGE_LOGGERS
from finetune.model.base_quantization import read_config_json
from finetune.model.gguf.architectures import text_settings, unsupported
from finetune.model.gguf.llama_cpp import (
    convert,
    find_quantizer,
    quantize,
    require_converter,
)
from finetune.model.gguf.modelfile import modelfile
from finetune.model.gguf.vocabulary import read_vocabulary
from finetune.model.source import BaseSource, find_base
from finetune.model.tokenizer import load_tokenizer
from finetune.run.load import read_trained_config

if TYPE_CHECKING:
    from finetune.config.schema import RunConfig
    from finetune.model.gguf.check import Comparison

log = logging.getLogger(__name__)

LOGGERS = (__name__, "finetune.model.gguf", *MERGE_LOGGERS)
"""Loggers whose lines the command prints."""

FORMATS = ("gguf",)

QUANTIZATIONS = ("q8_0", "q4_k_m")
"""What a file's weights may be quantised to: llama.cpp's names."""

FILE, MODELFILE, MERGED = "model.gguf", "Modelfile", "merged"


@dataclass(frozen=True)
class ExportedModel:
    """A model that was exported, and how it differs from the merged one."""

    path: Path
    """The folder with `model.gguf` and `Modelfile`."""
    file_type: str
    """The type of its matrices: a dtype, q8_0 or q4_k_m."""
    merged: MergedModel
    """What merging and rounding have changed. Its folder is not kept."""
    comparison: "Comparison | None"
    """The file, loaded again, against the merged model; None: transformers can't load it."""
    template_variables: Mapping[str, Any]
    """Variables of the chat template (`model.template_kwargs`)."""

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        comparison = self.comparison
        return {
            "folder": str(self.path),
            "file": str(self.path / FILE),
            "modelfile": str(self.path / MODELFILE),
            "type": self.file_type,
            "bytes": (self.path / FILE).stat().st_size,
            "checked": comparison is not None,
            "divergence": comparison and comparison.divergence,
            "largest_difference": comparison and comparison.largest_difference,
            "merge": {
                "dtype": self.merged.dtype,
                "effect": self.merged.effect,
                "verdict": self.merged.verdict,
            },
        }


@dataclass(frozen=True)
class _Settings:
    """How a run is exported, checked before anything loads."""

    dtype: str
    quantization: str | None
    llama_cpp: Path | None
    quantizer: Path | None
    """Path of `llama-quantize`, where it is needed."""

    @property
    def file_type(self) -> str:
        """The type of the exported file."""
        return self.quantization or self.dtype

    @property
    def written_type(self) -> str:
        """The type of the file before `llama-quantize`."""
        return self.dtype if self.quantizer is not None else self.file_type


def main() -> None:
    """Read the command line, export, print what to do with the files."""
    arguments = _parse_arguments()
    require_new_folder("--to", arguments.to)
    settings = _check_settings(arguments)
    run_folder = find_run("RUN", arguments.run)
    log_to_stderr(*LOGGERS)
    with json_output(arguments.json) as print_json:
        exported = export_run(run_folder, Path(arguments.to), settings)
        if arguments.json:
            print_json(exported.to_dict())
        else:
            print("\n".join(_result_lines(exported)))


def _parse_arguments() -> argparse.Namespace:
    parser = command_parser(
        "finetune.export",
        "Export the adapter of a run, merged into its base, for llama.cpp and Ollama.",
        "latest --to exported",
        "latest --to exported --quantize q8_0",
        "latest --to exported --llama-cpp ~/llama.cpp --quantize q4_k_m",
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--to",
        metavar="FOLDER",
        required=True,
        help="a new folder for model.gguf and Ollama's Modelfile",
    )
    parser.add_argument(
        "--format",
        default="gguf",
        choices=FORMATS,
        help="format of the model file (default: gguf)",
    )
    parser.add_argument(
        "--dtype",
        default="float16",
        choices=DTYPES,
        help="dtype of weights that are not quantised (default: float16, which rounds less than "
        "bfloat16)",
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
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of the result's lines"
    )
    return parser.parse_args()


def _check_settings(arguments: argparse.Namespace) -> _Settings:
    """Refuse what is missing of llama.cpp."""
    llama_cpp = None
    if arguments.llama_cpp is not None:
        llama_cpp = require_converter(arguments.llama_cpp)
    quantizer = None
    if arguments.quantize == "q4_k_m":
        quantizer = find_quantizer(llama_cpp, arguments.quantize)
    return _Settings(arguments.dtype, arguments.quantize, llama_cpp, quantizer)


def export_run(run_folder: Path, folder: Path, settings: _Settings) -> ExportedModel:
    """Merge a run's adapter into its base and write both as a GGUF file, with a Modelfile.

    Args:
        run_folder: The run folder.
        folder: The new folder.
        settings: How it is exported.

    Raises:
        ConfigError: The run can't be merged or exported, or the file is not the merged model;
            nothing is left in the folder.
    """
    require_mergeable(run_folder)
    config = read_trained_config(run_folder)
    source = find_base(config.model)
    if settings.llama_cpp is None:
        _require_writable(run_folder, source, config)

    from finetune.model.gguf.check import check_gguf

    with replace_folder(folder) as draft:
        draft.mkdir(parents=True)
        model, file = draft / MERGED, draft / FILE
        merged = merge_run(run_folder, model, settings.dtype)
        log.info("writing %s", folder / FILE)
        _write_file(model, file, settings, source)
        log.info("comparing the file with the merged model")
        comparison = check_gguf(model, file, settings.file_type)
        _write_modelfile(model, draft, config.model.template_kwargs)
        shutil.rmtree(model)
    return ExportedModel(
        folder, settings.file_type, merged, comparison, config.model.template_kwargs
    )


def _require_writable(
    run_folder: Path, source: BaseSource, config: "RunConfig"
) -> None:
    """Refuse a base whose architecture or tokenizer only llama.cpp's converter may export."""
    values = text_settings(read_config_json(source))
    reason = unsupported(values)
    if reason is not None:
        problem = f"of its base {source.public_name}, {reason} can't be written here"
        advice = "--llama-cpp FOLDER exports it with llama.cpp's converter, if that can"
        raise refusal("RUN", run_folder, f"{problem}; {advice}")
    tokenizer = load_tokenizer(source, config.model)
    # A published config may leave out what its class has as a default.
    read_vocabulary(tokenizer, values.get("vocab_size", len(tokenizer)))


def _write_file(
    model: Path, file: Path, settings: _Settings, source: BaseSource
) -> None:
    """Write the GGUF file of a merged model."""
    name = f"{source.public_name} fine-tuned"
    written = file if settings.quantizer is None else file.with_suffix(".unquantized")
    if settings.llama_cpp is not None:
        _copy_sentencepiece(source, model)
        convert(settings.llama_cpp, model, written, settings.written_type, name)
    else:
        from finetune.model.gguf.write import write_gguf

        write_gguf(model, written, settings.written_type, name)
    if settings.quantizer is not None:
        assert settings.quantization is not None
        quantize(settings.quantizer, written, file, settings.quantization)
        written.unlink()


def _copy_sentencepiece(source: BaseSource, model: Path) -> None:
    """Copy a base's `tokenizer.model`, which transformers does not save, for the converter."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    name = "tokenizer.model"
    location = Path(source.location)
    if location.is_dir():
        file = location / name
    else:
        try:
            file = Path(
                hf_hub_download(source.location, name, revision=source.revision)
            )
        except EntryNotFoundError:
            return
    if file.is_file():
        shutil.copyfile(file, model / name)


def _write_modelfile(model: Path, folder: Path, variables: Mapping[str, Any]) -> None:
    """Write Ollama's Modelfile beside the GGUF file."""
    from transformers import AutoTokenizer

    from finetune.model.gguf.write import read_ends

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = modelfile(FILE, tokenizer, read_ends(model), variables)
    write_text(folder / MODELFILE, text)


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


def ollama_name(name: str) -> str:
    """Return a name that Ollama accepts, like the one given."""
    name = name.lower()
    allowed = [
        letter if letter.isascii() and letter.isalnum() else "-" for letter in name
    ]
    return "".join(allowed).strip("-") or "model"


def _llama_command(file: Path, variables: Mapping[str, Any]) -> str:
    command = f"llama-server -m {shlex.quote(os.path.relpath(file))} --jinja"
    if variables:
        text = json.dumps(dict(variables))
        command += f" --chat-template-kwargs {shlex.quote(text)}"
    return command


if __name__ == "__main__":
    run_command(main)
