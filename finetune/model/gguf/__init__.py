"""Model folders as GGUF files, for llama.cpp and Ollama.

Where to look first:

- `write.py`: a GGUF file from a model folder; `architectures.py`: which models, and their settings;
  `vocabulary.py`: the tokenizer; `pre_tokenizers.py`: llama.cpp's names of pre-tokenizers.
- `llama_cpp.py`: llama.cpp's own converter and quantiser, as processes.
- `check.py`: compares a file with the model folder from which it was written.
- `modelfile.py`: Ollama's Modelfile; `go_template.py`: its chat template.
"""
