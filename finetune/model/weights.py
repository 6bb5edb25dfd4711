"""What transformers reports of the weights that it loaded: those that do not fit refuse the base.

A weight that is not in the files is random, and a weight of the files that the model does not have
is lost; transformers itself only warns.
"""

import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

from finetune.config.sections.model import ModelSettings
from finetune.errors import refusal

log = logging.getLogger(__name__)

SHOWN_NAMES = 2
"""How many names of each kind a message has."""

OTHER_MODALITY = re.compile(
    r"(^|[._])(vision|visual|image|img|audio|speech|video|multi_?modal|mm_projector|projector"
    r"|talker|code2wav|token2wav|mtp)([._]|$)"
)
"""Names of weights for images, sound and multi-token prediction, which a causal language model of
the same files does not have."""


COMPUTED = re.compile(
    r"(^|\.)((attn|attention)\.(masked_)?bias|inv_freq|position_ids|embed_positions|_extra_state)$"
)
"""Names of masks and positions that older versions of transformers saved, and that are computed."""


def check_weights(
    info: Mapping[str, Any],
    names: Mapping[str, Collection[str]],
    settings: ModelSettings,
) -> None:
    """Refuse a base whose files do not hold the model's weights, or hold others as well.

    Weights of other modalities, and those that the model's class ignores, are logged instead.

    Args:
        info: transformers' loading info.
        names: `missing` and `unexpected` names before the class's patterns were taken away.
        settings: `model`; `model.extra.ignore_mismatched_sizes` allows other shapes.

    Raises:
        ConfigError: Weights are missing, unexpected, or of another shape.
    """
    if not settings.extra.get("ignore_mismatched_sizes"):
        _check_shapes(info, settings)
    missing = set(info["missing_keys"])
    unexpected = set(info["unexpected_keys"])
    other = {name for name in unexpected if OTHER_MODALITY.search(name)}
    computed = {name for name in unexpected if COMPUTED.search(name)}
    rest = unexpected - other - computed
    problems = []
    if missing:
        problems.append(f"lack {len(missing)} of the model's weights ({_few(missing)})")
    if rest:
        problems.append(f"hold {len(rest)} that the model does not have ({_few(rest)})")
    if problems:
        reason = f"its files {' and '.join(problems)}"
        raise refusal("model.name_or_path", settings.name_or_path, reason)
    # transformers takes away what the class's patterns allow; what it took away is logged.
    ignored = set(names["unexpected"]) - unexpected
    absent = set(names["missing"]) - missing
    _log_names("not loaded, of other modalities or heads", other)
    _log_names("not loaded, as the model computes them", computed)
    _log_names("not loaded, as the model's class ignores them", ignored)
    _log_names("not in the files, as the model's class allows", absent)


def _check_shapes(info: Mapping[str, Any], settings: ModelSettings) -> None:
    """Refuse a base whose files hold weights of other shapes than its config says."""
    mismatched = sorted(info["mismatched_keys"])
    if not mismatched:
        return
    name, in_files, in_model = mismatched[0]
    of_files = f"{_shape(in_files)} in its files"
    of_model = f"{_shape(in_model)} by its config.json"
    example = f"{name}: {of_files}, {of_model}"
    reason = f"{len(mismatched)} of its weights have another shape ({example})"
    raise refusal("model.name_or_path", settings.name_or_path, reason)


def _log_names(reason: str, names: Collection[str]) -> None:
    if names:
        log.info(
            "model: %d of its weights %s: %s",
            len(names),
            reason,
            _few(names),
        )


def _few(names: Collection[str]) -> str:
    """The first names, and whether there are more."""
    first = sorted(names)[:SHOWN_NAMES]
    more = ["…"] if len(names) > len(first) else []
    return ", ".join([*first, *more])


def _shape(sizes: Collection[int]) -> str:
    return "x".join(map(str, sizes))
