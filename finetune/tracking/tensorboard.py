"""TensorBoard event files."""

import json
import os
import time
from typing import Any

from finetune.config.flatten import flatten
from finetune.config.schema import RunConfig
from finetune.files.run_folder import Metrics, RunFolder, checkpoint_step
from finetune.tracking.text_privacy import tracked_config
from finetune.tracking.tracker import Sample, Tracker

HPARAMS = ".hparams"
"""Ending of the event file with the config and the run's end."""


class TensorboardTracker(Tracker):
    """Event files in `tensorboard/` of the run folder."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder.path / "tensorboard"
        checkpoint = folder.last_checkpoint()
        # A resumed run logs the steps after its checkpoint again: hide the earlier ones.
        purge_step = checkpoint_step(checkpoint) + 1 if checkpoint else None
        self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)
        shown = tracked_config(config)
        text = json.dumps(shown, indent=2)
        self._writer.add_text("config", f"```\n{text}\n```")
        self._begin_session(shown)

    def _begin_session(self, config: dict[str, Any]) -> None:
        """Write the config as HParams.

        Without an experiment's summary, TensorBoard collects keys and metrics from all runs that it
        shows, so trials of a study with different keys stand in one table.
        """
        from torch.utils.tensorboard import FileWriter
        from torch.utils.tensorboard.summary import hparams

        # TensorBoard keeps the first of each of these summaries: those of an earlier session go.
        for earlier in self._folder.glob(f"*{HPARAMS}"):
            earlier.unlink()
        self._hparams = FileWriter(str(self._folder), filename_suffix=HPARAMS)
        values = {key: _hparam(value) for key, value in flatten(config).items()}
        _, start, self._end = hparams(values, {})  # type: ignore[no-untyped-call]
        self._hparams.add_summary(start)
        # Else it is in the file after two minutes, and never where the run is killed before.
        self._hparams.flush()

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
        try:
            self._writer.add_text("status", status)
            self._hparams.add_summary(self._end_of_session(status))
        finally:
            self._writer.close()
            self._hparams.close()

    def _end_of_session(self, status: str) -> Any:
        """Return the summary that ends the HParams of a run, with TensorBoard's status of it."""
        from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

        (value,) = self._end.value
        content = plugin_data_pb2.HParamsPluginData.FromString(
            value.metadata.plugin_data.content
        )
        if status not in ("completed", "pruned"):
            content.session_end_info.status = api_pb2.STATUS_FAILURE
        content.session_end_info.end_time_secs = time.time()
        value.metadata.plugin_data.content = content.SerializeToString()
        return self._end

    def locations(self) -> list[str]:
        return [f"TensorBoard: tensorboard --logdir {os.path.relpath(self._folder)}"]


def _hparam(value: Any) -> bool | int | float | str:
    """Return a value of the config as TensorBoard takes it."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
