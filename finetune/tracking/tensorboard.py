"""TensorBoard event files."""

import json
import os
from typing import Any

from finetune.config.schema import RunConfig
from finetune.files.run_folder import Metrics, RunFolder, checkpoint_step
from finetune.tracking.text_privacy import tracked_config
from finetune.tracking.tracker import Sample, Tracker


class TensorboardTracker(Tracker):
    """Event files in `tensorboard/` of the run folder."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder.path / "tensorboard"
        checkpoint = folder.last_checkpoint()
        # A resumed run logs the steps after its checkpoint again: hide the earlier ones.
        purge_step = checkpoint_step(checkpoint) + 1 if checkpoint else None
        self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)
        text = json.dumps(tracked_config(config), indent=2)
        self._writer.add_text("config", f"```\n{text}\n```")

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, step: int, samples: list[Sample]) -> None:
        for sample in samples:
            texts = []
            for name in ("expected", "before", "after"):
                if name in sample:
                    texts.append(f"**{name}:** {sample[name]}")
            text = "\n\n".join(texts)
            self._writer.add_text(f"samples/{sample['prompt']}", text, step)

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        self._writer.add_text("status", status)
        self._writer.close()

    def locations(self) -> list[str]:
        return [f"TensorBoard: tensorboard --logdir {os.path.relpath(self._folder)}"]
