"""A chat with a run's model: what is asked, what is shown, and in which order."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.models import load_tokenizer
from support.runs import Tiny

from finetune.data.types import Prompt
from finetune.engine.encoded_prompts import Sampling
from finetune.engine.generation import generate_answers
from finetune.engine.text_stream import TextStream
from finetune.files.run_folder import RunFolder
from finetune.run.chat import Chat
from finetune.run.load import TrainedRun

TOKENS = 40

SAMPLING = Sampling(1.0, seed=1)
"""Its likeliest tokens alone would be the same one again and again."""


@pytest.fixture
def trained(tiny: Tiny, tmp_path: Path) -> TrainedRun:
    """The tiny base, whose random weights answer with many different tokens."""
    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    config = tiny("quantization=none")
    base = load_base(find_base(config.model), config).eval()
    return TrainedRun(config, RunFolder(tmp_path), load_tokenizer(config), base)


def chat(trained: TrainedRun, sampling: Sampling = SAMPLING) -> Chat:
    begun = Chat(trained, trained.base, "Be brief.", sampling, TOKENS, None)
    begun.begin()
    return begun


def answer(trained: TrainedRun, messages: list[dict[str, Any]]) -> str:
    """The answer of the same model without a chat."""
    (text,) = generate_answers(
        trained.base,
        trained.tokenizer,
        [Prompt("", messages=messages)],
        trained.config.quantization,
        max_new_tokens=TOKENS,
        max_length=None,
        sampling=Sampling(1.0, seed=1 + len(messages)),
    )
    return text


def test_each_question_follows_what_was_said_before(trained: TrainedRun) -> None:
    begun = chat(trained)
    first = begun.answer("What is a list?", lambda text: None)
    second = begun.answer("And a tuple?", lambda text: None)

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a list?"},
    ]
    assert first
    assert first == answer(trained, messages)
    messages += [
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And a tuple?"},
    ]
    assert second == answer(trained, messages)
    begun.begin()
    assert begun.answer("What is a list?", lambda text: None) == first


def test_an_answer_appears_while_it_is_generated(trained: TrainedRun) -> None:
    pieces: list[str] = []
    whole = chat(trained).answer("What is a list?", pieces.append)

    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > TOKENS / 4


def test_a_question_that_is_interrupted_is_not_part_of_the_chat(
    trained: TrainedRun,
) -> None:
    begun = chat(trained)

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begun.answer("What is a list?", interrupt)
    assert [message["role"] for message in begun.messages] == ["system"]


def test_drawn_answers_repeat_by_seed_and_differ_between_questions(
    trained: TrainedRun,
) -> None:
    texts = []
    for settings in (SAMPLING, SAMPLING, Sampling(1.0, seed=2)):
        begun = chat(trained, settings)
        texts.append([begun.answer("Hi", lambda text: None) for _ in range(2)])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert texts[0][0] != texts[0][1]


@pytest.mark.parametrize("text", ["Grüße 🙂 aus Köln", "a  b\n\nc", "日本語", ""])
def test_text_of_any_alphabet_is_shown_whole(text: str, trained: TrainedRun) -> None:
    pieces: list[str] = []
    stream = TextStream(trained.tokenizer, pieces.append)
    ids = trained.tokenizer(f"  {text}\n", add_special_tokens=False)["input_ids"]
    for token in ids:
        stream.add([token])
        assert text.startswith("".join(pieces))
    stream.finish(text)
    assert "".join(pieces) == text


def test_the_time_of_a_token_does_not_grow_with_the_text(trained: TrainedRun) -> None:
    class Counting:
        """The tokenizer, and the lengths that it decodes."""

        lengths: ClassVar[list[int]] = []

        def decode(self, tokens: list[int], **options: Any) -> Any:
            self.lengths.append(len(tokens))
            return trained.tokenizer.decode(tokens, **options)

    stream: Any = TextStream(Counting(), lambda text: None)  # type: ignore[arg-type]
    for token in trained.tokenizer("What is a list? " * 50)["input_ids"]:
        stream.add([token])
    assert max(Counting.lengths) < 5


def test_an_answer_that_differs_as_a_whole_is_shown_again(trained: TrainedRun) -> None:
    pieces: list[str] = []
    stream = TextStream(trained.tokenizer, pieces.append)
    stream.add(trained.tokenizer("What")["input_ids"])
    stream.finish("Where is it?")
    assert "".join(pieces) == "What\nWhere is it?"
