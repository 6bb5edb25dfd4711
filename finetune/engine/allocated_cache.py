"""A cache of keys and values that is allocated once for a batch, instead of copied at each token.

Transformers' own one concatenates all keys and values anew for each token: of many rows, most of
the memory that a step reads and writes.
"""

from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from finetune.compat import caches_nothing
from finetune.engine.probes import base_of
from finetune.engine.step_cache import StepCache
from finetune.model.architectures import text_config_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers that cache keys and values alone."""

WINDOWS_OF_A_STEP = 2
"""A recorded step holds and reads all tokens in layers with a sliding window too: at most so many
times the window."""


class _AllocatedLayer(DynamicLayer):  # type: ignore[misc]
    """The keys and values of a layer, in memory for all tokens."""

    def __init__(self, capacity: int) -> None:
        """Set the size.

        Args:
            capacity: Tokens of the longest row.
        """
        super().__init__()
        self._capacity = capacity

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [rows, heads, tokens, head_dim]; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._key_memory = self._allocate(key_states)
            self._value_memory = self._allocate(value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        self._key_memory[:, :, start:stop] = key_states
        self._value_memory[:, :, start:stop] = value_states
        self.keys = self._key_memory[:, :, :stop]
        self.values = self._value_memory[:, :, :stop]
        # The first ones are consecutive in memory as they come, which attention reads faster.
        if start == 0:
            return key_states, value_states
        return self.keys, self.values

    def _allocate(self, states: torch.Tensor) -> torch.Tensor:
        rows, heads, _, head_dim = states.shape
        return states.new_empty(rows, heads, self._capacity, head_dim)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Go on with some rows only."""
        # A layer that uses the keys and values of another one caches none.
        length = self.get_seq_length()
        if not length:
            return
        self._key_memory = self._key_memory[indices]
        self._value_memory = self._value_memory[indices]
        self.keys = self._key_memory[:, :, :length]
        self.values = self._value_memory[:, :, :length]


def allocate_cache(
    model: "PreTrainedModel", tokens: int, *, records: bool = False
) -> DynamicCache | None:
    """Return an empty cache for a batch.

    Args:
        model: A base, or a base with an adapter.
        tokens: Tokens of the longest prompt and answer together.
        records: Whether its steps are recorded.

    Returns:
        The cache, a `StepCache` where steps are recorded and no window is much shorter than the
        rows; None for a base that may cache anything else than keys and values.
    """
    base = base_of(model)
    # Remote code may use a cache in other ways.
    if not type(base).__module__.startswith("transformers."):
        return None
    # Other classes have a cache of their own, or take none.
    if not getattr(base, "_supports_attention_backend", False):
        return None
    config = text_config_of(base.config)
    cache = DynamicCache(config=config)
    layers = [layer for layer in cache.layers if not caches_nothing(layer)]
    if any(type(layer) not in ATTENTION_LAYERS for layer in layers):
        return None
    windows = [layer.sliding_window for layer in layers if layer.is_sliding]
    if records and tokens <= WINDOWS_OF_A_STEP * min(windows, default=tokens):
        # With room for one more, so that the mask always hides something, and is always there.
        device = next(base.parameters()).device
        return StepCache(config, tokens + 1, device)
    for number, layer in enumerate(cache.layers):
        # Layers with a sliding window hold the window only.
        if type(layer) is DynamicLayer:
            cache.layers[number] = _AllocatedLayer(tokens)
    return cache
