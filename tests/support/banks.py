"""Banks with either backend."""

from typing import Any

from finetune.config.schema import RunConfig


def load_bank(config: RunConfig, saves: Any, borrows_blocks: bool = False) -> Any:
    """Load a config's base with the decoder, whose `gradient_checkpointing` is `saves`. None: with
    autograd."""
    from finetune.engine.packed.bank import Bank
    from finetune.engine.packed.gpu.decoder import Decoder
    from finetune.model.loading import load_base
    from finetune.model.quantization import dequantize_base
    from finetune.model.source import find_base

    base = load_base(find_base(config.model), config)
    dequantize_base(base, config)
    decoder = None if saves is None else Decoder(base, saves, borrows_blocks)
    bank = Bank(base, config, decoder)
    assert isinstance(bank.backends.current, Decoder) is (saves is not None)
    return bank
