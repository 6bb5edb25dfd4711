"""Training of one run by TRL's SFTTrainer, for configs that `packed` does not support.

`TrlTraining.train` starts the trainer; the training loop itself is transformers' `Trainer.train`.
Logging, evaluation and stopping are the `Reporter`'s, called from a trainer callback.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from finetune.compat import compute_on_one_gpu, set_train_sampler
from finetune.config.schema import RunConfig
from finetune.data.token_file import Tokens
from finetune.engine.budget import Budget
from finetune.engine.loaded_model import LoadedModel
from finetune.engine.optimizers import create_optimizer
from finetune.engine.probes import base_of
from finetune.engine.reporter import Reporter
from finetune.engine.schedule import unlimited_steps
from finetune.engine.steps import RunSteps, drive
from finetune.engine.trl.callback import ReporterCallback
from finetune.engine.trl.sampler import EpochSampler
from finetune.files.run_folder import RunFolder
from finetune.model.adapter import load_adapter
from finetune.model.heap import trimmed_heap

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


class TrlTraining(LoadedModel):
    """One run's model and trainer."""

    def __init__(
        self,
        config: RunConfig,
        arguments: SFTConfig,
        model: "PeftModel",
        tokenizer: "PreTrainedTokenizerBase",
        rows: Tokens,
    ) -> None:
        """Set up the training of a run.

        Args:
            config: The run's config.
            arguments: From `training_arguments`.
            model: The base with a fresh adapter; no other run uses it meanwhile.
            tokenizer: The base's tokenizer.
            rows: The tokenised training rows.
        """
        super().__init__(config, model)
        self._arguments = arguments
        self._tokenizer = tokenizer
        self._rows = rows

    def train(
        self,
        reporter: Reporter,
        folder: RunFolder,
        checkpoint: Path | None,
    ) -> RunSteps[None]:
        """Train until the last step or until the reporter stops the run.

        Args:
            reporter: Receives every step, evaluates, and decides when to stop.
            folder: The run's folder; checkpoints go where the training arguments say.
            checkpoint: To resume from; None: from the start.

        Returns:
            Nothing; the trained adapter is in `model`.
        """
        # A generator without requests: the base can't be shared with other runs.
        yield from ()
        # The Trainer would train one more step.
        if checkpoint is not None and reporter.is_complete:
            load_adapter(self.model, checkpoint)
            return
        trainer = self._create_trainer(reporter)
        resumed = None if checkpoint is None else str(checkpoint)
        with reporter.live(), trimmed_heap(base_of(self.model).base_model):
            drive(reporter.begin())
            if reporter.progress.stop is None:
                trainer.train(resume_from_checkpoint=resumed)

    def weights_on_cpu(self) -> "AbstractContextManager[None]":
        """Leave the weights where they are: no other run computes that a copy could wait for."""
        return nullcontext()

    def _budget(self, reporter: Reporter) -> Budget | None:
        """What the learning rate follows; None: the steps alone, as transformers has it."""
        trainer = self._config.trainer
        if trainer.max_tokens is None and trainer.max_minutes is None:
            return None
        steps = unlimited_steps(self._config, len(self._rows))
        return Budget(trainer, reporter.total, steps)

    def _loraplus_optimizer(self) -> "torch.optim.Optimizer | None":
        """The optimizer of LoRA+; None without it: the trainer creates its own."""
        if self._config.optimizer.lora_plus_ratio is None:
            return None
        return create_optimizer(self.model, self._config, is_paged=True)

    def _create_trainer(self, reporter: Reporter) -> SFTTrainer:
        # TRL casts a quantised base's adapter to bfloat16, in which an update of 2e-4 is rounded
        # away: the float32 weights are put back afterwards, before the optimizer is created.
        weights = {}
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                weights[name] = weight.detach().clone()
        compute_on_one_gpu(self._arguments)
        checkpoint_limit = self._config.trainer.extra.get("save_total_limit", 1)
        trainer = SFTTrainer(
            model=self.model,
            args=self._arguments,
            train_dataset=self._rows.to_dataset(),
            processing_class=self._tokenizer,
            callbacks=[
                ReporterCallback(reporter, checkpoint_limit, self._budget(reporter))
            ],
            optimizers=(self._loraplus_optimizer(), None),
        )
        for name, weight in self.model.named_parameters():
            if name in weights:
                weight.data = weights[name]
        lengths = self._rows.lengths
        set_train_sampler(trainer, EpochSampler(lengths, self._config))
        # The reporter shows progress.
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        return trainer
