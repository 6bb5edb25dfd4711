"""One run, from its checked config to its result.

`run` calls the three stages: `prepare`, `train`, `conclude`. `result` is what result.json holds,
`context` the run's surroundings, `resources` what runs share, `memory_plan` what decides
`trainer.gradient_checkpointing=auto` and the number of slots.
"""
