"""Sizes of the rows against sizes of the base, compared before the base is loaded."""

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from finetune.config.schema import RunConfig
from finetune.data.encoding import Encoder
from finetune.data.token_file import Tokens
from finetune.errors import refusal
from finetune.model.architectures import text_config_of
from finetune.model.base_config import read_base_config
from finetune.model.loading import skeleton_of
from finetune.model.source import BaseSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

POSITION_TABLE = re.compile(
    r"(^|\.)(wpe|embed_positions|positions?_embed|position_embeddings?|pos_emb\w*)(\.weight)?$"
)
"""Names of tables with one entry for each position, beyond which there is none (GPT-2, OPT, GPT-J).
Other bases compute their positions, and only are worse beyond those that they were trained on."""


def check_sizes(
    config: RunConfig,
    source: BaseSource,
    tokenizer: "PreTrainedTokenizerBase",
    splits: Mapping[str, Tokens],
) -> None:
    """Refuse rows with tokens or positions that the base does not have.

    Args:
        config: The run's config.
        source: Where the base is.
        tokenizer: Its tokenizer.
        splits: Tokenised rows by the name of their split.

    Raises:
        ConfigError: A token's id is not below the rows of the base's embedding, or a row is longer
            than its table of positions.
    """
    base_config = read_base_config(source, config.model)
    _check_token_ids(config, base_config, tokenizer, splits)
    _check_lengths(config, base_config, splits)


def _check_token_ids(
    config: RunConfig,
    base_config: "PreTrainedConfig",
    tokenizer: "PreTrainedTokenizerBase",
    splits: Mapping[str, Tokens],
) -> None:
    vocabulary: int | None = getattr(text_config_of(base_config), "vocab_size", None)
    if vocabulary is None:
        return
    largest = {name: tokens.report.largest_id for name, tokens in splits.items()}
    largest["end"] = max(Encoder(tokenizer, config.model.template_kwargs).ends)
    for name, token_id in largest.items():
        if token_id < vocabulary:
            continue
        token = tokenizer.convert_ids_to_tokens(token_id)
        where = "ends an answer" if name == "end" else f"stands in the {name} rows"
        reason = f"its embedding has {vocabulary} rows, but token {token_id} ({token}) {where}"
        remedy = "resize the embedding and save the base, or take its own tokenizer"
        raise refusal(
            "model.name_or_path", config.model.name_or_path, f"{reason}; {remedy}"
        )


def _check_lengths(
    config: RunConfig, base_config: "PreTrainedConfig", splits: Mapping[str, Tokens]
) -> None:
    positions = _positions(base_config)
    if positions is None:
        return
    for name, tokens in splits.items():
        longest = max(tokens.lengths, default=0)
        if longest <= positions:
            continue
        base = f"model.name_or_path={config.model.name_or_path}"
        sizes = f"the longest {name} row has {longest} tokens, {base} has {positions} positions"
        if _has_position_table(config, base_config):
            key = "dataset.max_length"
            reason = f"{sizes}; must be at most {positions}"
            raise refusal(key, config.dataset.max_length, reason)
        log.warning("data: %s: beyond them it is not trained", sizes)


def _positions(base_config: "PreTrainedConfig") -> int | None:
    """Return the positions that a base has, with those that a scaled RoPE adds; None: no limit."""
    shapes = text_config_of(base_config)
    positions = getattr(shapes, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    rope = (
        getattr(shapes, "rope_parameters", None)
        or getattr(shapes, "rope_scaling", None)
        or {}
    )
    # Gemma 3 has one set for each type of layer.
    nested = [values for values in rope.values() if isinstance(values, Mapping)]
    for values in [rope, *nested]:
        factor = values.get("factor")
        if isinstance(factor, int | float):
            original = values.get("original_max_position_embeddings") or positions
            positions = max(positions, int(factor * original))
    return positions


def _has_position_table(config: RunConfig, base_config: "PreTrainedConfig") -> bool:
    skeleton = skeleton_of(base_config, config.model)
    names = [name for name, _ in skeleton.named_parameters()]
    names += [name for name, _ in skeleton.named_buffers()]
    return any(POSITION_TABLE.search(name) for name in names)
