"""A run's adapter, merged into its base, as a GGUF file for llama.cpp and Ollama.

The file is written with the package gguf, or by llama.cpp's own converter. It counts when
transformers has loaded it again and its predictions are those of the merged model.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import refusal
from finetune.files.atomic import create_new_folder, write_text
from finetune.model.base_quantization import read_config_json
from finetune.model.gguf.architectures import text_settings, unsupported
from finetune.model.gguf.errors import ExportError
from finetune.model.gguf.llama_cpp import convert, quantize
from finetune.model.gguf.modelfile import modelfile
from finetune.model.gguf.vocabulary import (
    file_adds_bos,
    read_vocabulary,
    remove_bos,
)
from finetune.model.source import BaseSource, find_base
from finetune.model.tokenizer import load_tokenizer
from finetune.run.load import read_trained_config
from finetune.run.merging import LOGGERS as MERGE_LOGGERS
from finetune.run.merging import MergedModel, merge_run, require_mergeable

if TYPE_CHECKING:
    from finetune.config.schema import RunConfig
    from finetune.model.gguf.check import Comparison

log = logging.getLogger(__name__)

LOGGERS = (__name__, "finetune.model.gguf", *MERGE_LOGGERS)
"""Loggers whose lines the command prints."""

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
class ExportSettings:
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


def export_run(
    run_folder: Path, folder: Path, settings: ExportSettings
) -> ExportedModel:
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
        with _naming(run_folder):
            _require_writable(source, config)

    from finetune.model.gguf.check import check_gguf

    with _naming(run_folder), create_new_folder(folder) as draft:
        model, file = draft / MERGED, draft / FILE
        merged = merge_run(run_folder, model, settings.dtype)
        log.info("writing %s", folder / FILE)
        variables = config.model.template_kwargs
        _write_file(model, file, settings, source, variables)
        log.info("comparing the file with the merged model")
        comparison = check_gguf(model, file, settings.file_type, variables)
        _write_modelfile(model, draft, variables)
        shutil.rmtree(model)
    return ExportedModel(folder, settings.file_type, merged, comparison, variables)


@contextlib.contextmanager
def _naming(run_folder: Path) -> Iterator[None]:
    """Name the run in errors of its export."""
    try:
        yield
    except ExportError as error:
        raise refusal("RUN", run_folder, str(error)) from error


def _require_writable(source: BaseSource, config: "RunConfig") -> None:
    """Refuse a base whose architecture or tokenizer only llama.cpp's converter may export."""
    values = text_settings(read_config_json(source))
    reason = unsupported(values)
    if reason is not None:
        problem = f"of its base {source.public_name}, {reason} can't be written here"
        advice = "--llama-cpp FOLDER exports it with llama.cpp's converter, if that can"
        raise ExportError(f"{problem}; {advice}")
    tokenizer = load_tokenizer(source, config.model)
    # A published config may leave out what its class has as a default.
    read_vocabulary(tokenizer, values.get("vocab_size", len(tokenizer)))


def _write_file(
    model: Path,
    file: Path,
    settings: ExportSettings,
    source: BaseSource,
    variables: Mapping[str, Any],
) -> None:
    """Write the GGUF file of a merged model."""
    from transformers import AutoTokenizer

    name = f"{source.public_name} fine-tuned"
    written = file if settings.quantizer is None else file.with_suffix(".unquantized")
    if settings.llama_cpp is not None:
        _copy_sentencepiece(source, model)
        convert(settings.llama_cpp, model, written, settings.written_type, name)
        tokenizer = AutoTokenizer.from_pretrained(model)
        if not file_adds_bos(tokenizer, variables):
            remove_bos(written)
    else:
        from finetune.model.gguf.write import write_gguf

        write_gguf(model, written, settings.written_type, name, variables)
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
