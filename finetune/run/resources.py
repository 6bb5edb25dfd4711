"""What runs in one process share: rows, tokens, tokenizer and the frozen base, each made when first asked for."""

import atexit
import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from finetune.config.schema import DatasetSettings, ModelSettings, RunConfig, leaves_base_as_it_was
from finetune.data.rows import load_rows
from finetune.data.types import Row, Rows
from finetune.model.source import BaseSource, find_base

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from finetune.engine.packed.bank import Bank
    from finetune.engine.packed.slot import Slot


T = TypeVar("T")


atexit.register(gc.unfreeze)  # what `bank` freezes: at the end too all is let go


class SharedResources:
    """Keeps one of each kind, as long as runs ask for the same: the next trial neither reads nor loads anything."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[object, Any]] = {}

    def keep(self, kind: str, key: object, make: Callable[[], T]) -> T:
        """The thing of a kind that was made for this key, or a new one; one made for another key is let go first."""
        if kind not in self._kept or self._kept[kind][0] != key:
            self.drop(kind)
            self.put(kind, key, make())
        kept: T = self._kept[kind][1]
        return kept

    def known(self, kind: str, key: object) -> Any:
        """The thing of a kind that was made for this key, None if there is none."""
        kept = self._kept.get(kind)
        return kept[1] if kept is not None and kept[0] == key else None

    def put(self, kind: str, key: object, thing: object) -> None:
        """Keep a thing of a kind that was made for this key, in place of any other."""
        self._kept[kind] = (key, thing)

    def drop(self, kind: str) -> None:
        """Let go of what is kept of a kind, and give its memory back."""
        if self._kept.pop(kind, None) is not None and "torch" in sys.modules:
            from finetune.model.memory import free_memory

            free_memory()

    def rows(self, settings: DatasetSettings) -> Rows:
        """The data set, read and split."""
        return self.keep("rows", settings, lambda: load_rows(settings))

    def source(self, settings: ModelSettings) -> BaseSource:
        """Where the base is, and its hash."""
        return self.keep("source", settings, lambda: find_base(settings))

    def tokenizer(self, settings: ModelSettings) -> "PreTrainedTokenizerBase":
        """The base's tokenizer."""
        from finetune.model.loading import load_tokenizer

        return self.keep("tokenizer", settings, lambda: load_tokenizer(self.source(settings), settings))

    def tokens(self, part: str, rows: list[Row], config: RunConfig) -> "Dataset":
        """The rows of a part (train, eval, test), tokenised."""
        from finetune.data.tokens import tokenize

        key = (config.model, config.dataset)
        return self.keep(
            f"{part} tokens", key, lambda: tokenize(part, rows, self.tokenizer(config.model), config.dataset)
        )

    def bank(self, config: RunConfig) -> "Bank":
        """The base, quantised and frozen, for runs to put their adapters on."""
        from finetune.engine.packed.bank import Bank
        from finetune.model.loading import load_base
        from finetune.model.memory import free_memory
        from finetune.model.quantization import keep_dequantized

        def load() -> Bank:
            if gc.get_freeze_count():
                free_memory()  # another's base may be frozen still
            base = load_base(self.source(config.model), config)
            keep_dequantized(base, config)
            bank = Bank(base, config)
            free_memory()
            gc.freeze()  # what there is stays: at the end of each run the garbage collector need not go through it
            return bank

        return self.keep("bank", base_key(config), load)

    def has_room(self, config: RunConfig, engine: str) -> bool:
        """Whether a run can begin beside those that train: on the same base, in a slot of its own."""
        bank: Bank | None = self._kept["bank"][1] if "bank" in self._kept else None
        return (
            bank is None
            or not bank.slots_in_use
            or (engine == "packed" and self.known("bank", base_key(config)) is bank)
        )

    @contextlib.contextmanager
    def slot(self, config: RunConfig) -> "Iterator[Callable[[], Slot]]":
        """A place on the base, beside other runs'; called, it gives the slot, with a fresh adapter of the run's own.

        Of a large base that takes half a second to draw: whoever waits with the call lets others train meanwhile.
        """
        from finetune.model.memory import collect_garbage

        bank, lora, seed = self.bank(config), config.lora, config.seed
        model = _BESIDE.submit(bank.draw_adapter, lora, seed)
        bank.slots_in_use += 1
        try:
            yield lambda: bank.create_slot(lora, seed, model.result())  # noqa: F821  deleted once nobody calls any more
        finally:
            bank.slots_in_use -= 1
            model.cancel()
            del model, bank
            collect_garbage()  # the GPU's memory stays at hand for the next slot

    @contextlib.contextmanager
    def model(self, config: RunConfig) -> "Iterator[PeftModel]":
        """The base for this run alone, with a fresh adapter; afterwards it is as it was, for the next run."""
        from finetune.model.adapter import add_adapter
        from finetune.model.memory import free_memory

        base = self.bank(config).base
        forward = base.__dict__.get("forward")
        model = add_adapter(base, config.lora, config.seed)
        try:
            yield model
        finally:
            if leaves_base_as_it_was(config.lora):
                model.unload()
                base.__dict__.pop("forward", None)  # TRL wraps it anew for each run
                if forward is not None:
                    base.forward = forward
            else:
                self.drop("bank")
            del model, base
            free_memory()


_BESIDE = ThreadPoolExecutor(1)
"""Draws adapters while runs train."""


shared_resources = SharedResources()
"""What all runs of this process share, where they are told of no other."""


def base_key(config: RunConfig) -> object:
    """What a loaded base depends on; further arguments of the trainer may patch it in place."""
    return (config.model, config.quantization, config.trainer.gradient_checkpointing is True, config.trainer.extra)
