"""What the packed engine can do with a base: checked once for each kind, then read from the cache.

The check itself (`packed.architecture_check`) is imported only where there is no record of it.
"""

import functools
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from finetune.console import summary_line
from finetune.engine.check_record import record_file
from finetune.errors import Interrupted
from finetune.files.atomic import read_json, write_json
from finetune.model.memory import is_out_of_memory_error
from finetune.model.small_config import small_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CHECK_VERSION = 1
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
        small = small_config(config)
    # Each config class has its own ways to refuse sizes.
    except Exception as error:
        return PackedSupport(f"no small base to try it on ({summary_line(error)})")
    config_class: Any = type(small)
    return _recorded_support(small.to_json_string(use_diff=False), config_class)


@functools.cache
def _recorded_support(
    content: str, config_class: "type[PreTrainedConfig]"
) -> PackedSupport:
    """Return the record of the cache, or check and record it.

    Args:
        content: The small base's config as JSON.
        config_class: The class of the config.
    """
    identity = [CHECK_VERSION, config_class.__name__, content]
    record = record_file("architectures", identity)
    values = read_json(record)
    if values is not None:
        return PackedSupport(values["refusal"], values["answers_together"])
    # Late: it imports PEFT, which takes seconds.
    from finetune.engine.packed.architecture_check import check_architecture

    small = config_class.from_dict(json.loads(content))
    try:
        support = PackedSupport(*check_architecture(small))
    except Exception as error:
        # Neither says anything about the base.
        if isinstance(error, Interrupted) or is_out_of_memory_error(error):
            raise
        # Of any other error it is not known whether it comes again: it is not recorded.
        return PackedSupport(summary_line(error))
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, {"model_type": config_class.model_type, **asdict(support)})
    return support
