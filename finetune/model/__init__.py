"""The base model, its tokenizer, its quantization, and the adapter on it.

Where to look first:

- `source.py`: where a base is loaded from; `packaged.py`: the packaged model.
- `loading.py`: base, tokenizer and config, loaded with transformers; `weights.py`: whether they are
  what the model needs; `tokenizer.py`: its template and special tokens.
- `quantization.py`: 4-bit and 8-bit weights, the dtype of matrix products; `base_quantization.py`:
  of a base that is quantised already; `quantized_layers.py`: what stays in 16 bits.
- `origin.py`: what an adapter's files say of the base.
- `adapter.py`: the LoRA adapter: creation, saving, loading; `lora_config.py`: PEFT's config of it;
  `target_modules.py`: which layers get one.
- `device.py`: the GPU, CUDA events and streams; `memory.py`: memory of the GPU and the host.
- `architectures.py`: what is peculiar to architectures; `small_config.py`: small sizes of a base;
  `layer_kinds.py`: few layers of it, of all kinds.
- `published_names.py`: a text model that was published with other modalities.
"""
