"""What the packed engine can do with a base: checked once for each kind, then read from the cache.

The check itself (`packed.architecture_check`) is imported only where there is no record of it.
"""

import copy
import functools
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.console import summary_line
from finetune.engine.check_record import record_file
from finetune.errors import Interrupted, is_out_of_memory_error
from finetune.files.atomic import read_json, write_json
from finetune.model.small_config import narrow_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CHECK_VERSION = 3
"""Increased when the check or what it checks changes, so that earlier records are not used."""


@dataclass(frozen=True)
class PackedSupport:
    """What the packed engine can do with a base."""

    refusal: str | None
    """Why it can't train the base; None: it can."""
    answers_together: bool = True
    """Whether prompts are answered together, with the answers that each has alone."""


def packed_support(config: "PreTrainedConfig") -> PackedSupport:
    """Return what the packed engine can do with a base.

    Args:
        config: The base's text config, of transformers' own code.
    """
    try:
        narrow = narrow_config(config)
    # Each config class has its own ways to refuse sizes.
    except Exception as error:
        return PackedSupport(f"no small base to try it on ({summary_line(error)})")
    content = narrow.to_json_string(use_diff=False)
    return _recorded_support(_NarrowBase(type(narrow).__name__, content, narrow))


@dataclass(frozen=True)
class _NarrowBase:
    """A base of small sizes, with all layers, told from others by its config."""

    config_class: str
    content: str
    """The config as JSON, from which transformers can't read all values again (infinity)."""
    config: Any = field(compare=False)


@functools.cache
def _recorded_support(base: _NarrowBase) -> PackedSupport:
    """Return the record of the cache, or check and record it."""
    identity = [CHECK_VERSION, base.config_class, base.content]
    record = record_file("architectures", identity)
    values = read_json(record)
    if values is not None:
        return PackedSupport(values["refusal"], values["answers_together"])
    # Late: it imports PEFT, which takes seconds.
    from finetune.engine.packed.architecture_check import check_architecture

    config = copy.deepcopy(base.config)
    try:
        support = PackedSupport(*check_architecture(config))
    except Exception as error:
        # Neither says anything about the base.
        if isinstance(error, Interrupted) or is_out_of_memory_error(error):
            raise
        # Of any other error it is not known whether it comes again: it is not recorded.
        return PackedSupport(summary_line(error))
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, {"model_type": config.model_type, **asdict(support)})
    return support
