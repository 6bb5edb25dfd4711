"""The base as a searched parameter: `model=choice(smollm2_135m,gemma3_270m)`.

Trials of one base train together in slots. A trial of another base waits until these have ended,
see `SharedResources.has_room`.
"""

from collections.abc import Sequence

from finetune.config.schema import RunConfig
from finetune.config.sections.evaluation import BITS_PER_BYTE, LOSS_METRICS
from finetune.errors import refusal
from finetune.run.resources import shared_resources


def by_base(configs: Sequence[RunConfig]) -> dict[str, list[RunConfig]]:
    """Group configs by the names of their bases."""
    groups: dict[str, list[RunConfig]] = {}
    for config in configs:
        groups.setdefault(config.model.name_or_path, []).append(config)
    return groups


def require_comparable_bases(configs: Sequence[RunConfig]) -> None:
    """Refuse an objective that is per token where the bases cut text into other tokens.

    Args:
        configs: configs that have every base of the study.

    Raises:
        ConfigError: names the objective that compares bases.
    """
    groups = by_base(configs)
    objectives = [name for name in configs[0].objectives if _is_per_token(name)]
    if len(groups) < 2 or not objectives:
        return
    first_base = ""
    first_vocabulary: dict[str, int] = {}
    for base, of_base in groups.items():
        vocabulary = shared_resources.tokenizer(of_base[0].model).get_vocab()
        first_base = first_base or base
        first_vocabulary = first_vocabulary or vocabulary
        if vocabulary != first_vocabulary:
            reason = (
                f"is per token, and {first_base} and {base} have different tokens; "
                f"objective=eval/{BITS_PER_BYTE} compares them"
            )
            raise refusal("objective", objectives[0], reason)


def _is_per_token(objective: str) -> bool:
    split, _, name = objective.partition("/")
    return split == "eval" and name.rpartition("/")[2] in LOSS_METRICS
