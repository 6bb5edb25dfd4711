"""Where a base model is loaded from, and the hash that identifies it."""

import contextlib
import functools
import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

from finetune.config.sections.model import ModelSettings
from finetune.errors import refusal
from finetune.files.atomic import read_json
from finetune.files.hub import HUB_TIMEOUT, ask_hub
from finetune.model.adapter_files import ADAPTER_CONFIG
from finetune.model.packaged import PACKAGED_MODELS

log = logging.getLogger(__name__)

HASH_THREADS = 4

HASH_CHUNK_BYTES = 2**24
"""Read at once. With small chunks the threads would mostly wait for Python's global lock."""

BASE_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
"""Files of a base on the hub that transformers reads."""

OTHER_FORMATS = ["*/*", "consolidated*"]
"""Files that hold the same weights for other programs."""

LOGGED_HASH_BYTES = 10**9
"""To hash more than this takes seconds, which a log line explains."""


class WeightsHash:
    """One SHA-256 over a base's weight files, computed by background threads.

    Hashing starts at once, because it may take seconds in which a study imports its libraries.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        """Start hashing weight files; their names alone decide their order."""
        self._files = sorted(files)
        # Its threads are daemons: a process that needs no hash any more does not wait for them.
        pool = ThreadPool(HASH_THREADS)
        self._digests = pool.map_async(_file_digest, self._files, chunksize=1)
        pool.close()

    def hexdigest(self) -> str:
        """Wait for the hash. Files that could not be read are tried again.

        Raises:
            OSError: A file can't be read this time either.
        """
        if not self._digests.ready():
            self._log_wait()
        try:
            digests = self._digests.get()
        except OSError:
            digests = [_file_digest(file) for file in self._files]
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def _log_wait(self) -> None:
        """Say what a run waits for, if the weights are large."""
        # A file that is gone is the hash's error, once every thread has ended.
        size = sum(file.stat().st_size for file in self._files if file.exists())
        if size > LOGGED_HASH_BYTES:
            folder = self._files[0].parent
            log.info("hashing %.1f GB of weights of %s", size / 1e9, folder)


def _file_digest(file: Path) -> bytes:
    """Return a file's SHA-256, computed once as long as its size and time stamp stay the same."""
    status = file.stat()
    return _compute_digest(file.absolute(), status.st_size, status.st_mtime_ns)


@functools.cache
def _compute_digest(file: Path, size: int, modified_ns: int) -> bytes:
    """Compute a file's SHA-256; size and time stamp are keys of the cache."""
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(HASH_CHUNK_BYTES))
    # Unbuffered and into one piece of memory, so that nothing is copied on the way to the hash.
    with open(file, "rb", buffering=0) as weights:
        while count := weights.readinto(chunk):
            digest.update(chunk[:count])
    return digest.digest()


@dataclass(frozen=True)
class BaseSource:
    """Where a base model is loaded from, and what identifies it."""

    location: str
    """A folder, or a hub id."""
    name: str
    """`model.name_or_path`."""
    revision: str | None = None
    """Commit on the hub; None: a folder."""
    sha256: str | WeightsHash | None = None
    """Hash of the weights; None: a base on the hub."""

    @property
    def public_name(self) -> str:
        """What an adapter's files call the base: its hub id, or its folder's name without a path.

        A packaged model has the hub id of the model whose weights it holds.
        """
        packaged = PACKAGED_MODELS.get(self.name)
        # A folder of the user's may have the same name.
        if packaged is not None and self.sha256 == packaged.sha256:
            return packaged.hub_id
        if self.revision is None and Path(self.location).is_dir():
            return Path(self.name).expanduser().absolute().name
        return self.name

    @property
    def identity(self) -> dict[str, str | None]:
        """The entry `base_model` of `result.json`. Waits for the hash of the weights."""
        sha256 = self.sha256
        if isinstance(sha256, WeightsHash):
            sha256 = sha256.hexdigest()
        return {"name": self.name, "revision": self.revision, "sha256": sha256}


def find_base(settings: ModelSettings) -> BaseSource:
    """Locate the base that `model.name_or_path` names; download a packaged model if needed.

    Raises:
        ConfigError: There is no such model, it is not a base, or the hub does not answer.
    """
    name = settings.name_or_path
    folder = Path(name).expanduser()
    # A folder of that name comes first.
    packaged = PACKAGED_MODELS.get(name)
    if packaged is not None and not folder.exists():
        packaged_folder = packaged.fetch()
        return BaseSource(
            location=str(packaged_folder),
            name=name,
            sha256=packaged.sha256,
        )
    if folder.exists():
        _require_base(folder, name)
        weights = WeightsHash(folder.glob("*.safetensors"))
        return BaseSource(
            location=str(folder.absolute()),
            name=name,
            sha256=weights,
        )
    is_path = name.startswith((".", "/", "~"))
    if is_path or name.count("/") != 1:
        packaged_names = ", ".join(PACKAGED_MODELS)
        allowed = f"{packaged_names}, a hub id (owner/name), a folder"
        raise refusal("model.name_or_path", name, f"no such folder; allowed: {allowed}")
    return _find_on_hub(settings)


def fetch_weights(source: BaseSource, settings: ModelSettings) -> tuple[Path, int]:
    """Bring a base from the hub into the hub's cache: what transformers reads of it.

    Returns:
        The folder with the base's files, and the bytes of its weights.

    Raises:
        ConfigError: The hub can't be reached and the cache does not hold the whole base.
    """
    folder = Path(source.location)
    if source.revision is not None:
        folder = _fetch_from_hub(source, settings)
    _require_base(folder, source.name)
    return folder, sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _fetch_from_hub(source: BaseSource, settings: ModelSettings) -> Path:
    def fetch() -> Path:
        return _snapshot(settings, source.revision, local_files_only=False)

    def in_cache() -> Path:
        return _snapshot(settings, source.revision, local_files_only=True)

    instead = "try again where the hub can be reached"
    return ask_hub("model.name_or_path", source.name, fetch, in_cache, instead)


def _snapshot(
    settings: ModelSettings, revision: str | None, local_files_only: bool
) -> Path:
    """Return the folder of a base in the hub's cache; download what is not there.

    A base in the cache counts as whole with the files that transformers reads.
    """
    from huggingface_hub import snapshot_download

    files = [*BASE_FILES, "*.py"] if settings.trust_remote_code else BASE_FILES
    folder = snapshot_download(
        settings.name_or_path,
        revision=revision,
        allow_patterns=files,
        ignore_patterns=OTHER_FORMATS,
        local_files_only=local_files_only,
    )
    return Path(folder)


def _require_base(folder: Path, name: str) -> None:
    """Refuse a folder that is not a base with readable safetensors weights."""
    key = "model.name_or_path"
    if (folder / ADAPTER_CONFIG).is_file():
        remedy = "python -m finetune.merge makes a base of it"
        raise refusal(key, name, f"is a LoRA adapter, not a base; {remedy}")
    if not (folder / "config.json").is_file():
        raise refusal(key, name, "is no model folder: it has no config.json")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        reason = "has no *.safetensors weights (pickled ones are not loaded)"
        raise refusal(key, name, reason)
    # Opened here, so that it is said before the hash or the loading meets it.
    for file in weights:
        try:
            file.open("rb").close()
        except OSError as error:
            reason = f"{file.name} can't be read ({error.strerror})"
            raise refusal(key, name, reason) from None
    _require_all_weights(folder, name)


def _require_all_weights(folder: Path, name: str) -> None:
    """Refuse a base of which a weight file that its index names is not there."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    for file in sorted(set(read_json(index)["weight_map"].values())):
        if not (folder / file).exists():
            reason = f"{file} is missing, which its index names"
            raise refusal("model.name_or_path", name, reason)


def _find_on_hub(settings: ModelSettings) -> BaseSource:
    """Locate a base on the hub, or in the hub's local cache if the hub can't be reached."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    name, revision = settings.name_or_path, settings.revision

    def ask() -> BaseSource:
        commit = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT).sha
        # The base is loaded by its commit. This notes in the cache which one the branch has, so
        # that a run without a network finds it.
        with contextlib.suppress(EntryNotFoundError):
            hf_hub_download(name, "config.json", revision=revision)
        return BaseSource(location=name, name=name, revision=commit)

    def in_cache() -> BaseSource:
        snapshot = _snapshot(settings, revision, local_files_only=True)
        _require_base(snapshot, name)
        # The cache names the folder of a snapshot by its commit.
        return BaseSource(location=name, name=name, revision=snapshot.name)

    instead = "model.name_or_path=FOLDER takes a model folder from this machine"
    return ask_hub("model.name_or_path", name, ask, in_cache, instead)
