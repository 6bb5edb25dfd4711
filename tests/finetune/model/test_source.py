"""Finding a base and hashing its weights."""

import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from support.runs import Tiny

from finetune.errors import ConfigError

pytestmark = pytest.mark.usefixtures("fresh_cache")


def test_a_bases_weights_are_hashed_once_while_others_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib
    import io
    import threading

    from finetune.model.source import BaseSource, WeightsHash

    begins, reads = threading.Event(), []

    class Watched(io.FileIO):
        def readinto(self, part: Any) -> int:
            assert begins.wait(60)
            reads.append(Path(str(self.name)).name)
            return super().readinto(part) or 0

    monkeypatch.setattr(
        "finetune.model.source.open",
        lambda file, mode, buffering: Watched(file),
        raising=False,
    )
    for name in ("b.safetensors", "a.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    source = BaseSource(
        str(tmp_path), "base", sha256=WeightsHash(tmp_path.glob("*.safetensors"))
    )
    begins.set()
    parts = [
        hashlib.sha256(name).digest() for name in (b"a.safetensors", b"b.safetensors")
    ]
    expected = hashlib.sha256(b"".join(parts)).hexdigest()
    assert source.identity == {"name": "base", "revision": None, "sha256": expected}
    assert WeightsHash(tmp_path.glob("*.safetensors")).hexdigest() == expected
    assert sorted(reads) == [
        "a.safetensors",
        "a.safetensors",
        "b.safetensors",
        "b.safetensors",
    ]  # each till its end
    (tmp_path / "a.safetensors").write_bytes(b"another")
    assert WeightsHash(tmp_path.glob("*.safetensors")).hexdigest() != expected


@pytest.mark.parametrize(
    ("size", "is_hashed", "lines"),
    [
        (3, False, ["hashing 1.5 GB of weights of {folder}"]),
        (3, True, []),
        (2, False, []),
    ],
    ids=["large", "hashed already", "small"],
)
def test_a_run_that_waits_for_the_hash_of_large_weights_says_so(
    size: int,
    is_hashed: bool,
    lines: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import threading

    from finetune.model import source

    hashes = threading.Event()
    digest = source._file_digest

    def slow_digest(file: Path) -> bytes:
        assert hashes.wait(60)
        return digest(file)

    file = tmp_path / "model.safetensors"
    file.touch()
    os.truncate(file, size * 5 * 10**8)  # without content, so that it takes no space
    monkeypatch.setattr(source, "_compute_digest", lambda *_: b"digest")
    monkeypatch.setattr(source, "_file_digest", slow_digest)
    weights = source.WeightsHash([file])
    if is_hashed:
        hashes.set()
        weights.hexdigest()
        caplog.clear()
    # Of large weights the line comes before the hash, however late it is.
    said = logging.Handler()
    said.emit = lambda record: hashes.set()  # type: ignore[method-assign]
    monkeypatch.setattr(source.log, "handlers", [said] if lines else [])
    if not lines:
        threading.Timer(0.2, hashes.set).start()
    with caplog.at_level("INFO"):
        weights.hexdigest()
    assert caplog.messages == [line.format(folder=tmp_path) for line in lines]


def test_weights_that_could_not_be_read_once_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.model import source

    digest = source._file_digest

    def late_digest(file: Path) -> bytes:
        time.sleep(0.2)  # the hash is asked for before its threads have read anything
        return digest(file)

    gone = tmp_path / "gone.safetensors"
    with monkeypatch.context() as late:
        late.setattr(source, "_file_digest", late_digest)
        weights = source.WeightsHash([gone])
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                weights.hexdigest()
        # Half written: a thread that still ran would take this for the whole file.
        gone.touch()
        time.sleep(0.3)
    gone.write_bytes(b"back")
    assert weights.hexdigest() == source.WeightsHash([gone]).hexdigest()


def test_a_base_with_a_file_that_cant_be_read_is_refused_at_once(
    tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    from finetune.model.source import find_base

    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    (folder / "model-2.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"model-2\.safetensors can't be read"):
        find_base(tiny(f"model.name_or_path={folder}").model)
