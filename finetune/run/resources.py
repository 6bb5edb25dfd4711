"""What the runs of one process share: rows, tokens, tokenizer and the loaded base.

Each is created when a run first needs it, and kept while the following runs need the same: the next
trial of a study neither reads nor loads anything.
"""

import contextlib
import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from finetune.config.schema import RunConfig
from finetune.config.sections.dataset import DatasetSettings
from finetune.config.sections.model import ModelSettings
from finetune.config.sections.trainer import KEEPS_BASE
from finetune.data.row_file import StoredRows
from finetune.data.rows import Rows, load_rows
from finetune.data.token_file import Tokens
from finetune.data.tokens import tokenize
from finetune.data.types import Prompt, Row
from finetune.files.run_folder import Metrics
from finetune.metrics.labels import LabelledRows, Labels, find_labels
from finetune.model.heap import trim_heap
from finetune.model.source import BaseSource, find_base
from finetune.run.cached import Cached
from finetune.run.evaluation_work import Work, task_work
from finetune.run.harness_prompts import Documents
from finetune.run.shared_computation import SharedComputation

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from finetune.engine.packed.bank import Bank
    from finetune.engine.packed.slot import Slot

ADAPTER_THREAD = ThreadPoolExecutor(1)
"""Draws the adapter of the next run while others train: of a 7B base it takes half a second."""

log = logging.getLogger(__name__)


class SharedResources:
    """One value of each kind, for all runs that get the same `SharedResources`."""

    def __init__(self) -> None:
        self._borrows_blocks = False
        self._rows: Cached[DatasetSettings, Rows] = Cached()
        self._source: Cached[ModelSettings, BaseSource] = Cached()
        self._tokenizer: Cached[ModelSettings, PreTrainedTokenizerBase] = Cached()
        self._tokens: dict[str, Cached[object, Tokens]] = {
            split: Cached() for split in ("train", "eval", "test")
        }
        self._labels: Cached[object, Labels] = Cached(frees_memory=False)
        self._labelled_rows: dict[str, Cached[object, LabelledRows]] = {
            split: Cached(frees_memory=False) for split in ("eval", "test")
        }
        self._bank: Cached[object, Bank] = Cached()
        self._base_answers: Cached[object, SharedComputation[list[str]]] = Cached(
            frees_memory=False
        )
        self._base_metrics: Cached[object, SharedComputation[Metrics]] = Cached(
            frees_memory=False
        )
        self._checked_targets: Cached[object, bool] = Cached(frees_memory=False)
        self._task_work: dict[Documents, Cached[object, Work]] = {
            "eval": Cached(frees_memory=False),
            "test": Cached(frees_memory=False),
        }

    def rows(self, settings: DatasetSettings) -> Rows:
        """Return the data set, read and split."""
        return self._rows.get(settings, lambda: load_rows(settings))

    def source(self, settings: ModelSettings) -> BaseSource:
        """Return where the base is loaded from, and its hash."""
        return self._source.get(settings, lambda: find_base(settings))

    def tokenizer(self, settings: ModelSettings) -> "PreTrainedTokenizerBase":
        """Return the base's tokenizer."""
        from finetune.model.tokenizer import load_tokenizer

        return self._tokenizer.get(
            settings, lambda: load_tokenizer(self.source(settings), settings)
        )

    def tokens(
        self,
        split: str,
        rows: StoredRows,
        config: RunConfig,
    ) -> Tokens:
        """Return the tokenised rows of a split.

        Args:
            split: train, eval or test.
            rows: The rows of that split of `config.dataset`.
            config: Names the data set and the tokenizer.
        """

        def create() -> Tokens:
            return tokenize(
                split,
                rows,
                self.tokenizer(config.model),
                config.dataset,
                config.model.template_kwargs,
            )

        key = (config.model, config.dataset)
        return self._tokens[split].get(key, create)

    def labels(self, rows: Sequence[Row], config: RunConfig) -> Labels:
        """Return the labels of a classification.

        Args:
            rows: The training rows of `config.dataset`.
            config: Says what is a label.

        Raises:
            ConfigError: The rows' answers are no small set.
        """
        key = (config.dataset, config.evaluation)
        return self._labels.get(key, lambda: find_labels(rows, config.evaluation))

    def labelled_rows(
        self,
        split: str,
        rows: Sequence[Row],
        labels: Labels | None,
        config: RunConfig,
    ) -> LabelledRows | None:
        """Return the rows of a split with each label; None without labels.

        Args:
            split: eval or test.
            rows: The rows of that split of `config.dataset`.
            labels: From `labels`.
            config: Names the data set and the tokenizer.

        Raises:
            ConfigError: A row's answer is no label.
        """
        if labels is None:
            return None

        def create() -> LabelledRows:
            return LabelledRows.create(
                rows,
                labels,
                config.evaluation,
                self.tokenizer(config.model),
                config.model.template_kwargs,
                config.dataset.max_length,
            )

        key = (config.model, config.dataset, config.evaluation)
        return self._labelled_rows[split].get(key, create)

    def task_work(self, documents: Documents, config: RunConfig) -> Work:
        """Return the work of the tasks of lm-evaluation-harness.

        Args:
            documents: eval or test.
            config: Names the tasks and the tokenizer.

        Raises:
            ConfigError: A task can't be used.
        """

        def create() -> Work:
            return task_work(config, self.tokenizer(config.model), documents)

        if not config.evaluation.has_tasks:
            return Work()
        key = (config.model, config.evaluation, config.trainer)
        return self._task_work[documents].get(key, create)

    def check_targets(self, config: RunConfig) -> None:
        """Raise ConfigError where the base lacks a module that `lora` names."""
        from finetune.model.initial_adapter import check_initial_adapter
        from finetune.model.layer_patterns import check_layer_patterns
        from finetune.model.target_modules import check_targets

        lora = config.lora

        def check() -> bool:
            source = self.source(config.model)
            check_targets(source, config.model, lora)
            check_layer_patterns(source, config.model, lora)
            check_initial_adapter(source, config.model, lora)
            return True

        self._checked_targets.get((config.model, lora), check)

    def base_answers(
        self, config: RunConfig, prompts: Sequence[Prompt]
    ) -> SharedComputation[list[str]]:
        """Return the base's answers to prompts, which the first run generates."""
        limits = (config.sample_max_new_tokens, config.sample_max_length)
        key = (config.model, config.quantization, tuple(prompts), limits)
        return self._base_answers.get(key, SharedComputation)

    def base_metrics(
        self, config: RunConfig, engine: str
    ) -> SharedComputation[Metrics]:
        """Return the base's metrics on the held-out rows, which the first run computes."""
        batch_size = config.trainer.per_device_eval_batch_size
        evaluation = config.evaluation
        key = (
            config.model,
            config.quantization,
            config.dataset,
            batch_size,
            engine,
            evaluation,
            # `eval/bits_per_byte` is computed for runs that have it as their objective.
            tuple(config.objectives),
        )
        return self._base_metrics.get(key, SharedComputation)

    def bank(self, config: RunConfig) -> "Bank":
        """Return the base, quantised and frozen, with the slots that runs train in."""
        return self._bank.get(base_key(config), lambda: self._load_bank(config))

    @contextlib.contextmanager
    def borrowed_blocks(self, borrows: bool) -> Iterator[None]:
        """Load bases within the block for runs that share several GPUs in one way or the other.

        Args:
            borrows: As the plan of the runs decides, see `Plan.borrows_blocks`.
        """
        before = self._borrows_blocks
        self._borrows_blocks = borrows
        try:
            yield
        finally:
            self._borrows_blocks = before

    def loaded_bank(self) -> "Bank | None":
        """Return the bank if a base is loaded."""
        entry = self._bank.peek()
        return None if entry is None else entry[1]

    def release(self) -> None:
        """Forget everything. The caller frees the memory, once for all."""
        for value in vars(self).values():
            for cached in value.values() if isinstance(value, dict) else [value]:
                if isinstance(cached, Cached):
                    cached.forget()

    def _load_bank(self, config: RunConfig) -> "Bank":
        from finetune.engine.packed.bank import Bank
        from finetune.model.loading import load_base
        from finetune.model.memory import free_memory, freeze_libraries
        from finetune.model.quantization import dequantize_base

        freeze_libraries()
        free_memory()  # the base of another owner, which is in use no more
        _log_loading(config)
        base = load_base(self.source(config.model), config)
        free_memory()  # what loading leaves behind may hold the mapped files
        dequantize_base(base, config)
        bank = Bank(base, config, borrows_blocks=self._borrows_blocks)
        free_memory()
        return bank

    def has_room(self, config: RunConfig, engine: str) -> bool:
        """Whether a run can begin now: no run trains, or all train in slots of the same base."""
        entry = self._bank.peek()
        if entry is None:
            return True
        loaded_key, bank = entry
        if not bank.slots_in_use:
            return True
        return engine == "packed" and loaded_key == base_key(config)

    @contextlib.contextmanager
    def slot(self, config: RunConfig) -> "Iterator[Callable[[], Slot]]":
        """Reserve a slot on the bank; yields a function that returns it with a fresh adapter.

        The adapter is initialised by another thread: a run that calls the function one step later
        lets the others train meanwhile.
        """
        bank = self.bank(config)
        lora = config.lora
        seed = config.seed
        adapter = ADAPTER_THREAD.submit(bank.adapters.create, lora, seed)
        bank.slots_in_use += 1
        slots: list[Slot] = []

        def create() -> "Slot":
            slots.append(bank.slots.create(lora, seed, adapter.result()))  # noqa: F821  both exist then
            return slots[-1]

        try:
            yield create
        finally:
            bank.slots_in_use -= 1
            ended = [weakref.ref(slot) for slot in slots]
            # Emptied, as the caller may still have the function.
            while slots:
                bank.slots.remove(slots.pop())
            adapter.cancel()
            del adapter, bank
            # The GPU's memory stays reserved for the next slot. A collection would visit the
            # adapters of all slots, which takes 0.3 s with 16 of them on 200 layers.
            if any(slot() is not None for slot in ended):
                gc.collect()
            trim_heap()

    @contextlib.contextmanager
    def model(self, config: RunConfig) -> "Iterator[PeftModel]":
        """Lend the base to one run, with a fresh adapter; afterwards it is as it was."""
        from finetune.model.adapter import add_adapter
        from finetune.model.initial_adapter import load_initial_adapter
        from finetune.model.memory import free_memory

        base = self.bank(config).base
        forward = base.__dict__.get("forward")
        model = add_adapter(base, config.lora, config.seed)
        load_initial_adapter(model, config.lora)
        is_unchanged = config.lora.leaves_base_unchanged
        try:
            yield model
        except BaseException:
            # transformers leaves the hook of NEFTune on the base.
            has_noise = "neftune_noise_alpha" in config.trainer.extra
            is_unchanged = is_unchanged and not has_noise
            raise
        finally:
            if is_unchanged:
                model.unload()
                base.__dict__.pop("forward", None)  # TRL wraps it anew for each run
                if forward is not None:
                    base.forward = forward
            else:
                self._bank.drop()
            del model, base
            free_memory()


shared_resources = SharedResources()
"""The resources of all runs of this process that are started by Hydra."""


def _log_loading(config: RunConfig) -> None:
    """Say what is loaded: on a large base this takes minutes in which nothing else is shown."""
    quantization = config.quantization
    is_quantized = quantization.load_in_4bit or quantization.load_in_8bit
    note = " and quantising it" if is_quantized else ""
    log.info("loading the base %s%s", config.model.name_or_path, note)


def base_key(config: RunConfig) -> object:
    """Return what a loaded base depends on; `trainer.extra` may make TRL patch it in place."""
    from finetune.model.device import on_gpu

    checkpointing = config.trainer.checkpointing
    if not on_gpu():
        # On a CPU partial is the same as true.
        checkpointing = bool(checkpointing)
    extra = {
        name: value
        for name, value in config.trainer.extra.items()
        if name not in KEEPS_BASE
    }
    return (
        config.model,
        config.quantization,
        config.trainer.gpus,
        checkpointing,
        extra,
    )
