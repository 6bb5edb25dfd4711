"""Engines turn batches into weight updates.

Where to look first:

- `packed/training.py`: the training loop of the packed engine, one run as a generator.
- `trl/training.py`: the same for TRL's SFTTrainer.
- `selection.py`: which of the two trains a run, and why.
- `steps.py`: the generator protocol by which several runs train in one process.
- `reporter.py`: what both engines do after each optimizer step: log, evaluate, stop.
- `output.py`: where metrics go: `metrics.jsonl`, the tracker, the terminal.
- `early_stopping.py`: the best evaluation, its adapter, and the patience.
- `schedule.py`: number of steps, order of the rows, steps with an evaluation.
- `evaluation.py`, `generation.py`: the loss on held-out rows, and answers to prompts.
- `prediction.py`: the logits of a batch's answer tokens, for `evaluation.py`.
- `checkpoint.py`: the format of a checkpoint's folder.
"""
