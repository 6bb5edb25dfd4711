"""The licence of a run's base, which holds for its adapter too: from the base's card and files."""

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.config.schema import RunConfig
from finetune.console import summary_line
from finetune.files.atomic import read_json
from finetune.files.hub import HUB_TIMEOUT
from finetune.files.run_folder import RunFolder
from finetune.model.packaged import PACKAGED_MODELS

log = logging.getLogger(__name__)

LICENSE_FILE = re.compile(r"(?i)(LICEN[CS]E|NOTICE|USE_POLICY)(\.\w+)?")
"""Files of a base that are published with its adapters."""


@dataclass(frozen=True)
class CardBase:
    """A base, as a model card names it."""

    name: str
    """Its hub id, or the name of its folder."""
    is_on_hub: bool
    revision: str | None = None
    """Commit on the hub."""
    note: str | None = None
    """What is to be known of a base that is not loaded from the hub."""
    license: str | None = None
    """As cards name it; None: not known."""
    license_name: str | None = None
    license_link: str | None = None
    license_files: dict[str, Path] = field(default_factory=dict)
    """Files with its text, by their names."""


def find_base_card(folder: RunFolder, config: RunConfig) -> CardBase:
    """Return what is known of a run's base: from the hub, its folder, or the packaged models."""
    recorded = (read_json(folder.result) or {}).get("base_model") or {}
    name = config.model.name_or_path
    packaged = PACKAGED_MODELS.get(name)
    if packaged is not None:
        note = f"in the run: its GGUF file of a Python package, `{packaged.name}`"
        return CardBase(
            packaged.hub_id,
            is_on_hub=True,
            note=note,
            license=packaged.license,
        )
    # A base from the hub has a commit, a folder has none.
    if recorded.get("revision") is not None:
        return _of_hub(name, recorded["revision"])
    return _of_folder(Path(name).expanduser())


def _of_hub(name: str, revision: str) -> CardBase:
    from huggingface_hub import HfApi, hf_hub_download

    base = CardBase(name, is_on_hub=True, revision=revision)
    try:
        info = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
        files = {}
        for sibling in info.siblings or []:
            if LICENSE_FILE.fullmatch(sibling.rfilename):
                path = hf_hub_download(name, sibling.rfilename, revision=revision)
                files[sibling.rfilename] = Path(path)
    # A card without a licence is better than none: it says that the licence is not known.
    except Exception as error:
        log.warning("%s: its licence is not known (%s)", name, summary_line(error))
        return base
    return _with_license(base, info.card_data or {}, files)


def _of_folder(folder: Path) -> CardBase:
    note = "a folder on the machine that trained the adapter"
    base = CardBase(folder.name, is_on_hub=False, note=note)
    if not folder.is_dir():
        return base
    files = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and LICENSE_FILE.fullmatch(path.name)
    }
    return _with_license(base, _read_card(folder / "README.md"), files)


def _read_card(path: Path) -> dict[str, Any]:
    """Return the YAML fields of a model card, empty if there are none."""
    from huggingface_hub import metadata_load

    try:
        fields: dict[str, Any] | None = metadata_load(path)
    # No such file, or one that is no card.
    except Exception:
        return {}
    return fields or {}


def _with_license(base: CardBase, card: Any, files: dict[str, Path]) -> CardBase:
    """Return a base with the licence that its card names; `card` has `get`, as a mapping."""
    return CardBase(
        base.name,
        base.is_on_hub,
        base.revision,
        base.note,
        card.get("license"),
        card.get("license_name"),
        card.get("license_link"),
        files,
    )
