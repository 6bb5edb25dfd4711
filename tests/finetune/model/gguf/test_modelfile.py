"""Ollama's Modelfile: chat templates in Go's language write what the Jinja templates write."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.models import CHATML

from finetune.data.chat_template import ChatTemplate
from finetune.model.gguf.go_template import PLAIN, ChatFrame, chat_frame
from finetune.model.gguf.modelfile import modelfile

OLLAMA_PROBE = os.environ.get("OLLAMA_PROBE")
"""A program of Ollama's packages parser and template: MODELFILE CHATS → commands and texts."""

LLAMA2 = (
    "{% if messages[0].role == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)

DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ 'S:be kind\\n' }}{% endif %}"
    "{% for message in messages %}{{ message.role[0] | upper + ':' + message.content + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)

NO_SYSTEM = (
    "{% for message in messages %}{% if message.role == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}"
    "{{ message.role + ':' + message.content + '\\n' }}{% endfor %}"
)

THINKING = CHATML + (
    "{% if add_generation_prompt and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)

COUNTING = "{% for message in messages %}{{ loop.index ~ message.role + message.content }}{% endfor %}"

BRACES = "{% for message in messages %}{{ '{{' + message.role + '}}' + message.content }}{% endfor %}"

TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "default-system": DEFAULT_SYSTEM,
    "no-system": NO_SYSTEM,
    "thinking": THINKING,
    "braces": BRACES,
}

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi {{ you }}"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes.\nNo."},
        {"role": "user", "content": "And?"},
    ],
]


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base, bos_token="<|im_start|>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_frame_writes_chats_as_the_template_does(name: str, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    template = ChatTemplate(tokenizer, {"enable_thinking": False})
    frame = chat_frame(template, None)
    assert frame is not None
    for chat in CHATS:
        assert frame.render(chat) == template.render(chat, ask=True)
    assert ("<think>" in frame.to_go()) == (name == "thinking")


@pytest.mark.skipif(OLLAMA_PROBE is None, reason="OLLAMA_PROBE names no program")
@pytest.mark.parametrize("name", TEMPLATES)
def test_ollama_reads_the_modelfile_and_writes_chats_as_the_template_does(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    variables = {"enable_thinking": False}
    file = tmp_path / "Modelfile"
    file.write_text(modelfile("model.gguf", tokenizer, [1], variables))
    (tmp_path / "chats.json").write_text(json.dumps(CHATS))
    command = [str(OLLAMA_PROBE), str(file), str(tmp_path / "chats.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shown = json.loads(done.stdout)
    template = ChatTemplate(tokenizer, variables)
    assert shown["texts"] == [template.render(chat, ask=True) for chat in CHATS]
    assert [each[0] for each in shown["commands"]] == ["model", "template", "stop"]
    assert shown["commands"][2][1] == "<|im_end|>"


def test_what_depends_on_more_than_the_messages_has_no_frame(tokenizer: Any) -> None:
    tokenizer.chat_template = COUNTING
    assert chat_frame(ChatTemplate(tokenizer), None) is None
    text = modelfile("model.gguf", tokenizer, [1], {"style": "short"})
    assert 'TEMPLATE "' not in text
    assert '# Its variables in training: {"style": "short"}' in text
    assert text.startswith("FROM ./model.gguf\n# Without TEMPLATE, ")
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')


def test_the_beginning_that_llama_cpp_adds_is_not_written_twice(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    template = ChatTemplate(tokenizer)
    frame, without = chat_frame(template, None), chat_frame(template, "<|im_start|>")
    assert frame is not None
    assert without is not None
    assert frame.before_question == "<|im_start|>" + without.before_question
    assert frame.before_system == "<|im_start|>" + without.before_system


def test_a_model_without_a_template_is_asked_by_the_question_alone(
    tokenizer: Any,
) -> None:
    tokenizer.chat_template = None
    text = modelfile("model.gguf", tokenizer, [1], {})
    assert f'TEMPLATE """{PLAIN}"""\n' in text


def test_a_go_template_keeps_braces_of_the_chat_template() -> None:
    frame = ChatFrame("{{a}}", "", "", "", "", "")
    assert '{{ else }}{{ "{{" }}a}}{{ end }}' in frame.to_go()
