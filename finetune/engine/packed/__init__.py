"""The packed engine: many runs train together on one frozen base.

Where to look first:

- `training.py`: the training loop of one run, which yields requests.
- `requests.py`: the requests; `sweeps/study/pack.py` decides which are executed together.
- `bank.py`: executes them on the base, by `training_pass.py`, `evaluation_pass.py` and
  `generation_pass.py`; `batch.py`: rows as one sequence.
- `bank_slots.py`: creates the slots of a bank; `slot.py`: one adapter.
- `architecture_check.py`, `backend_probe.py`: whether a base is computed as by its own code.
- `autograd_backend.py` computes with PyTorch, `gpu/` with Triton kernels.
"""
