"""One QLoRA fine-tuning run, from its config to an adapter with its evaluation."""

__version__ = "0.1.0"
