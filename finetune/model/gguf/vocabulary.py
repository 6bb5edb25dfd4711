"""A tokenizer as a GGUF file holds it: tokens, their types, merges or scores, special tokens.

Two kinds are written: byte-level BPE (`gpt2` in llama.cpp), and BPE with bytes as a fallback, as
SentencePiece trains it (`llama`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.chat_template import QUESTION, ChatTemplate
from finetune.errors import ConfigError
from finetune.model.gguf.errors import ExportError
from finetune.model.gguf.pre_tokenizers import pre_tokenizer_name

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"
"""How SentencePiece writes a space."""

ENCODED_SPACE = chr(ord(" ") + 256)
"""How a space within one side of a merge is written, as a merge is two tokens with a space."""

LEAST_SCORE = -1000000.0
"""The score of a token that no merge produces."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer in the order of their ids, and how texts are cut into them."""

    model: str
    """llama.cpp's name of the algorithm: gpt2 or llama."""
    pre_tokenizer: str
    """llama.cpp's name of the rule that cuts a text before merging."""
    tokens: Sequence[str]
    types: Sequence[int]
    """`gguf.TokenType` of each token."""
    merges: Sequence[str] = ()
    """Pairs in the order in which they are merged; `gpt2` only."""
    scores: Sequence[float] = ()
    """Of each token: the highest is merged first; `llama` only."""
    adds_space: bool | None = None
    """Whether a text gets a space before it; `llama` only."""

    def add_to(self, writer: "GGUFWriter") -> None:
        """Add the vocabulary to a file's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre_tokenizer)
        writer.add_token_list(list(self.tokens))
        if self.scores:
            writer.add_token_scores(list(self.scores))
        writer.add_token_types(list(self.types))
        if self.merges:
            writer.add_token_merges(list(self.merges))
        if self.adds_space is not None:
            writer.add_add_space_prefix(self.adds_space)


def read_vocabulary(tokenizer: "PreTrainedTokenizerBase", size: int) -> Vocabulary:
    """Return a tokenizer's vocabulary.

    Args:
        tokenizer: A tokenizer of the library `tokenizers`.
        size: Rows of the model's embeddings; ids beyond the tokenizer's get unused tokens.

    Raises:
        ExportError: It is neither of the two kinds, or llama.cpp has no name for how it cuts texts.
    """
    if not tokenizer.is_fast:
        raise _refused("is not one of the library tokenizers")
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    algorithm = values["model"]
    if algorithm["type"] != "BPE":
        raise _refused(f"is of the type {algorithm['type']}, not BPE")
    if _has_type(values["pre_tokenizer"], "ByteLevel"):
        return _byte_level(tokenizer, values, size)
    if algorithm.get("byte_fallback"):
        return _sentencepiece(tokenizer, values, size)
    raise _refused("is neither byte-level nor has bytes as a fallback")


def _refused(reason: str) -> ExportError:
    return ExportError(f"the tokenizer {reason}; --llama-cpp FOLDER may export it")


def _has_type(section: Any, name: str) -> bool:
    """Whether a section of `tokenizer.json`, or one inside it, has a type."""
    if isinstance(section, Mapping):
        return section.get("type") == name or _has_type(list(section.values()), name)
    return isinstance(section, list) and any(
        _has_type(value, name) for value in section
    )


def _byte_level(
    tokenizer: "PreTrainedTokenizerBase", values: Mapping[str, Any], size: int
) -> Vocabulary:
    name = pre_tokenizer_name(tokenizer)
    if name is None:
        raise _refused("cuts texts by a rule that has no name in llama.cpp")
    tokens, types = _tokens(tokenizer, values, size)
    merges = [
        " ".join(side.replace(" ", ENCODED_SPACE) for side in pair)
        for pair in _pairs(values)
    ]
    return Vocabulary("gpt2", name, tokens, types, merges=merges)


def _sentencepiece(
    tokenizer: "PreTrainedTokenizerBase", values: Mapping[str, Any], size: int
) -> Vocabulary:
    tokens, types = _tokens(tokenizer, values, size)
    scores_by_token = _scores(_pairs(values))
    scores = [scores_by_token.get(token, LEAST_SCORE) for token in tokens]
    return Vocabulary(
        "llama",
        "default",
        tokens,
        types,
        scores=scores,
        adds_space=_adds_space(values),
    )


def _adds_space(values: Mapping[str, Any]) -> bool:
    """Whether a text gets a space before it."""
    if _has_type(values["normalizer"], "Prepend"):
        return True
    if not _has_type(values["pre_tokenizer"], "Metaspace"):
        return False
    text = json.dumps(values["pre_tokenizer"])
    return '"prepend_scheme": "never"' not in text


def _pairs(values: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """The merges of `tokenizer.json`, in its newer or older form."""
    for pair in values["model"]["merges"]:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        yield left, right


def _scores(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Return the scores by which llama.cpp merges the pairs in their order.

    llama.cpp merges the neighbours whose token has the highest score, so the score of a token says
    when it is merged: minus the rank of its first pair.
    """
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(pairs):
        scores.setdefault(left + right, -float(rank))
    return scores


def _tokens(
    tokenizer: "PreTrainedTokenizerBase", values: Mapping[str, Any], size: int
) -> tuple[list[str], list[int]]:
    """Return the tokens and their types, in the order of their ids."""
    from gguf import TokenType

    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise _refused(f"has ids up to {max(by_id)}, the model has {size} embeddings")
    added = {token["id"]: token for token in values["added_tokens"]}
    unknown = values["model"].get("unk_token")
    has_bytes = bool(values["model"].get("byte_fallback"))
    tokens, types = [], []
    for index in range(size):
        token = by_id.get(index, f"[PAD{index}]")
        if index not in by_id:
            kind = TokenType.UNUSED
        elif has_bytes and token == unknown:
            kind = TokenType.UNKNOWN
        elif index in added and (added[index]["special"] or looks_special(token)):
            kind = TokenType.CONTROL
        elif index in added:
            kind = TokenType.USER_DEFINED
            token = token.replace(SPACE, " ") if has_bytes else token
        elif has_bytes and is_byte(token):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def is_byte(token: str) -> bool:
    """Whether a token stands for one byte, as `<0x0A>`."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def looks_special(token: str) -> bool:
    """Whether an added token is one that steers a model, although its tokenizer does not say so.

    llama.cpp's converter has the same rule: some tokenizers mark ends of turns as plain tokens.
    """
    is_unused = token.startswith("<unused") and token.endswith(">")
    is_framed = token.startswith("<|") and token.endswith("|>")
    return is_unused or is_framed or token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a tokenizer puts its BOS token before every text."""
    first = tokenizer("a")["input_ids"][0]
    return bool(first == tokenizer.bos_token_id)


def file_adds_bos(
    tokenizer: "PreTrainedTokenizerBase", variables: Mapping[str, Any] | None = None
) -> bool:
    """Return whether llama.cpp must put the BOS token before every text, chats too.

    Chats are trained as the template renders them, without a BOS token that the tokenizer would
    add. llama.cpp does not write it twice where the template writes it too.

    Args:
        tokenizer: The model's tokenizer, with its chat template.
        variables: Variables of the chat template (`model.template_kwargs`).
    """
    if not adds_bos(tokenizer):
        return False
    if tokenizer.chat_template is None:
        return True
    question = {"role": "user", "content": QUESTION}
    try:
        text = ChatTemplate(tokenizer, variables).render([question], ask=True)
    except ConfigError:
        # It renders no plain chat, so no text tells.
        return True
    return text.startswith(str(tokenizer.bos_token))


def remove_bos(file: Path) -> None:
    """Make llama.cpp put no BOS token before texts, in a file that its converter wrote.

    The converter follows the tokenizer. Of a file that does not say it, nothing is changed.
    """
    from gguf import GGUFReader, Keys

    reader = GGUFReader(file, "r+")
    field = reader.get_field(Keys.Tokenizer.ADD_BOS)
    if field is not None:
        field.parts[field.data[0]][0] = False
    reader.data.flush()


def add_special_tokens(
    writer: "GGUFWriter",
    tokenizer: "PreTrainedTokenizerBase",
    ends: Sequence[int],
    variables: Mapping[str, Any] | None = None,
) -> None:
    """Add the special tokens, the ends of answers and the chat template.

    Args:
        writer: The file's writer.
        tokenizer: The tokenizer, with the base's own special tokens.
        ends: Ids of the tokens that end an answer (`generation_config.json`).
        variables: Variables of the chat template.
    """
    end = tokenizer.eos_token_id
    if end is None and ends:
        end = ends[0]
    ids = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_eos_token_id: end,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
        # llama.cpp stops at the end of a turn too.
        writer.add_eot_token_id: next((other for other in ends if other != end), None),
    }
    for add, token_id in ids.items():
        if token_id is not None:
            add(token_id)
    text_ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(file_adds_bos(tokenizer, variables))
    writer.add_add_eos_token(len(text_ids) > 1 and text_ids[-1] == end)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
