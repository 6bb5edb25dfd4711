"""The TRL engine: one run, trained by TRL's SFTTrainer."""
