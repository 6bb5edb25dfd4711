"""One QLoRA fine-tuning run, from one resolved config to an adapter with its proof. Knows nothing of studies."""

__version__ = "0.1.0"
