"""The base model, its tokenizer, its quantization, and the adapter on it.

Where to look first:

- `source.py`: where a base is loaded from; `packaged.py`: the packaged model.
- `loading.py`: base and config, `tokenizer.py`: tokenizer, loaded with transformers.
- `quantization.py`: 4-bit and 8-bit weights, the dtype of matrix products.
- `adapter.py`: the LoRA adapter: its `LoraConfig`, creation, saving, loading.
- `device.py`: the GPU, CUDA events and streams; `memory.py`: memory of the GPU and the host.
- `architectures.py`: which bases the packed engine supports.
"""
