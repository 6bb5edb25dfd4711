"""The base model, its tokenizer, its quantization, and the adapter on it."""
