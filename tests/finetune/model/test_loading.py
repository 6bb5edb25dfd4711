"""Loading a base's tokenizer: padding and chat template."""

import shutil
from pathlib import Path

import pytest
from support.models import load_tokenizer
from support.runs import Tiny

pytestmark = pytest.mark.usefixtures("fresh_cache")


def test_the_tokenizer_pads_on_the_right_with_the_end_token_whatever_its_files_say(
    tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    other = AutoTokenizer.from_pretrained(
        folder, pad_token="<|im_start|>", padding_side="left"
    )
    other.save_pretrained(folder)
    tokenizer = load_tokenizer(tiny(f"model.name_or_path={folder}"))
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<|im_end|>", "right")


def test_a_template_of_the_config_replaces_the_tokenizers_own(tiny: Tiny) -> None:
    tokenizer = load_tokenizer(tiny("model.chat_template='{{ messages[0].content }}'"))
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert load_tokenizer(tiny()).chat_template.startswith(
        "{% for message in messages %}"
    )
