"""A cache of keys and values whose tensors stay the same from token to token.

So a step, the pass that computes one token of each row, can be recorded and launched again
(`recorded_steps`). Attention then reads the memory of all tokens, places that are not filled yet
included; the mask hides them.
"""

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from finetune.compat import caches_nothing


class StepCache(DynamicCache):  # type: ignore[misc]
    """The keys and values of all layers, and how many tokens they are of."""

    def __init__(
        self, config: PreTrainedConfig, capacity: int, device: torch.device
    ) -> None:
        """Nothing is cached yet.

        Args:
            config: Of the text model.
            capacity: More than the tokens of the longest row.
            device: Computes the passes.
        """
        super().__init__(config=config)
        self.capacity = capacity
        self.tokens = 0
        """Tokens of each row, padding included."""
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        """`tokens`, for kernels that are launched again."""
        # Layers with a sliding window hold all tokens too: the mask hides those before it.
        for number, layer in enumerate(self.layers):
            if not caches_nothing(layer):
                self.layers[number] = _StepLayer(self, layer.is_sliding)

    def advance(self, tokens: int) -> None:
        """Count the tokens that a pass has cached in all layers."""
        self.tokens += tokens
        self.position.fill_(self.tokens)


class _StepLayer(DynamicLayer):  # type: ignore[misc]
    """The keys and values of a layer."""

    # transformers then makes the masks before the pass.
    is_compileable = True

    def __init__(self, cache: StepCache, is_sliding: bool) -> None:
        super().__init__()
        self._cache = cache
        self.is_sliding = is_sliding

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cache the prompts' keys and values, or those of a step [rows, heads, tokens, head_dim].

        Returns:
            What attention reads: those of the prompts, or all memory.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys = self._allocate(key_states)
            self.values = self._allocate(value_states)
        if self._cache.tokens == 0:
            tokens = key_states.shape[-2]
            self.keys[:, :, :tokens] = key_states
            self.values[:, :, :tokens] = value_states
            return key_states, value_states
        self.keys.index_copy_(2, self._cache.position, key_states)
        self.values.index_copy_(2, self._cache.position, value_states)
        return self.keys, self.values

    def _allocate(self, states: torch.Tensor) -> torch.Tensor:
        rows, heads, _, head_dim = states.shape
        # Zeros: where the mask hides a NaN, attention is NaN nevertheless.
        return states.new_zeros(rows, heads, self._cache.capacity, head_dim)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys attention reads, and the position of the first."""
        if self._cache.tokens == 0:
            return query_length, 0
        return self._cache.capacity, 0

    def get_seq_length(self) -> int:
        """Return how many tokens of each row are cached."""
        return self._cache.tokens

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Go on with some rows only."""
        # A layer that uses the keys and values of another one caches none.
        if self.is_initialized:
            self.keys = self.keys[indices]
            self.values = self.values[indices]
