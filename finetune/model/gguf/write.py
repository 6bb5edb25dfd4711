"""Write a model folder as a GGUF file, with the writer and the tensor names of the package gguf."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

from finetune.files.atomic import name_file_in_errors, read_json
from finetune.model.gguf.architectures import (
    ARCHITECTURES,
    Architecture,
    add_settings,
    rotary_of,
)
from finetune.model.gguf.errors import ExportError
from finetune.model.gguf.vocabulary import add_special_tokens, read_vocabulary
from finetune.model.origin import GENERATION_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FILE_TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
"""Types of a file's matrices that are written here, by our names."""


def write_gguf(
    folder: Path,
    file: Path,
    file_type: str,
    name: str,
    variables: Mapping[str, Any] | None = None,
) -> None:
    """Write a model folder as one GGUF file.

    Args:
        folder: A model with safetensors weights and its tokenizer, of `ARCHITECTURES`.
        file: The file.
        file_type: A key of `FILE_TYPES`; vectors, and norms, are written in float32.
        name: What the file calls the model.
        variables: Variables of the chat template (`model.template_kwargs`).

    Raises:
        ExportError: A weight has no name in llama.cpp, or the tokenizer is refused.
    """
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    architecture = ARCHITECTURES[config.model_type]
    matrix_type, file_id = FILE_TYPES[file_type]
    writer = gguf.GGUFWriter(file, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_id)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_settings(writer, config)
    read_vocabulary(tokenizer, config.vocab_size).add_to(writer)
    add_special_tokens(writer, tokenizer, read_ends(folder), variables)

    weights = _Weights(folder, config, architecture)
    for tensor_name, shape in weights.shapes():
        dtype = stored_type(tensor_name, shape, matrix_type)
        is_packed = dtype not in (
            gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16
        )  # fmt: skip
        stored = gguf.quant_shape_to_byte_shape(shape, dtype) if is_packed else shape
        element = np.dtype(_ELEMENTS.get(dtype, np.uint8))
        size = int(np.prod(stored)) * element.itemsize
        writer.add_tensor_info(tensor_name, stored, element, size, raw_dtype=dtype)
    with name_file_in_errors(file):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # One tensor at a time, in the same order, so that the model is never in memory at once.
        for tensor_name, values in weights.values():
            dtype = stored_type(tensor_name, values.shape, matrix_type)
            writer.write_tensor_data(gguf.quants.quantize(values, dtype))
        writer.close()


_ELEMENTS = {
    gguf.GGMLQuantizationType.F32: np.float32,
    gguf.GGMLQuantizationType.F16: np.float16,
}
"""Elements of types that are not packed."""


def read_ends(folder: Path) -> list[int]:
    """Return the ids of the tokens that end an answer, of a model folder."""
    values = read_json(folder / GENERATION_CONFIG) or {}
    ids = values.get("eos_token_id")
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list) else [ids]


def stored_type(
    name: str, shape: tuple[int, ...], matrix_type: gguf.GGMLQuantizationType
) -> gguf.GGMLQuantizationType:
    """Return the type in which a tensor is stored.

    Vectors and norms stay in float32, as llama.cpp reads them; rows that are no multiple of a
    block's length can't be quantised, and get 16 bits.
    """
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return gguf.GGMLQuantizationType.F32
    block_length = gguf.GGML_QUANT_SIZES[matrix_type][0]
    if shape[-1] % block_length:
        return gguf.GGMLQuantizationType.F16
    return matrix_type


class _Weights:
    """The tensors of a model folder under llama.cpp's names and in its layout."""

    def __init__(
        self, folder: Path, config: "PreTrainedConfig", architecture: Architecture
    ) -> None:
        self._files = sorted(folder.glob("*.safetensors"))
        self._config = config
        self._architecture = architecture
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        self._names = gguf.get_tensor_name_map(
            kinds[architecture.name], config.num_hidden_layers
        )

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and the shape of each tensor."""
        rotary = self._rotary_factors()
        if rotary is not None:
            yield rotary[0], tuple(rotary[1].shape)
        for file, published, name in self._stored():
            yield name, tuple(file.get_slice(published).get_shape())

    def values(self) -> Iterator[tuple[str, "np.ndarray[Any, Any]"]]:
        """Yield the name and the values of each tensor in float32, in the same order."""
        rotary = self._rotary_factors()
        if rotary is not None:
            yield rotary
        for file, published, name in self._stored():
            tensor = file.get_tensor(published).float()
            if self._architecture.interleaves_rotary:
                tensor = self._interleave(tensor, published)
            if name.endswith("norm.weight"):
                tensor = tensor + self._architecture.norm_offset
            yield name, tensor.numpy()

    def _stored(self) -> Iterator[tuple[Any, str, str]]:
        """Yield each tensor's file, its published name and llama.cpp's."""
        for path in self._files:
            with safe_open(path, framework="pt") as file:
                for published in file.keys():  # noqa: SIM118, it is no mapping
                    if self._is_tied_head(published):
                        continue
                    yield file, published, self._name(published)

    def _is_tied_head(self, published: str) -> bool:
        return published == "lm_head.weight" and self._config.tie_word_embeddings

    def _name(self, published: str) -> str:
        name: str | None = self._names.get_name(published, (".weight", ".bias"))
        if name is None:
            reason = f"its weight {published} has no name in llama.cpp"
            raise ExportError(f"{reason}; --llama-cpp FOLDER may export it")
        return name

    def _interleave(self, tensor: torch.Tensor, published: str) -> torch.Tensor:
        """Put the rows of queries and keys into the order of rotary pairs."""
        projection = published.rpartition(".")[0].rpartition(".")[2]
        heads = {
            "q_proj": self._config.num_attention_heads,
            "k_proj": self._config.num_key_value_heads,
        }.get(projection)
        if heads is None:
            return tensor
        halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape).contiguous()

    def _rotary_factors(self) -> "tuple[str, np.ndarray[Any, Any]] | None":
        """What llama.cpp divides the rotary frequencies by, where Llama 3 scales them."""
        rotary = rotary_of(self._config)
        if rotary.get("rope_type") != "llama3":
            return None
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self._config, torch.device("cpu"))
        size = 2 * scaled.numel()
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        factors = 1.0 / rotary["rope_theta"] ** exponents / scaled
        return "rope_freqs.weight", factors.numpy()
