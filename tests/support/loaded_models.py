"""The models that this process holds."""

import gc

from finetune.run.resources import shared_resources


def loaded_models() -> int:
    """How many language models this process holds; none of them for later runs."""
    from transformers import PreTrainedModel

    assert shared_resources.loaded_bank() is None
    gc.unfreeze()  # what is frozen is not listed
    gc.collect()
    return sum(
        issubclass(type(thing), PreTrainedModel) and hasattr(thing, "lm_head")
        for thing in gc.get_objects()
    )
