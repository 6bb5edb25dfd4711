"""Architectures of base models that the packed engine knows."""

LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3", "smollm3"}
"""Architectures whose decoder's last state goes through one linear head, and into the loss as it is."""
