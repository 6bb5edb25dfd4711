"""Texts that end answers: where they are looked for, and what rows beside change."""

from typing import Any

import pytest
from support.models import load, load_tokenizer
from support.runs import NONE, Tiny

from finetune.config.schema import RunConfig
from finetune.engine import batch_decoding
from finetune.engine.batch_decoding import TOKENS_OF_A_CALL
from finetune.engine.encoded_prompts import EncodedPrompts, Sampling, StopTexts

LIMIT = 6 * TOKENS_OF_A_CALL
TEXTS = ("Hm?", "What does math.gcd do in Python, and why?", "Sea, or not?")


class Base:
    """A base with its tokenizer, which never ends an answer by itself."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.model = load(config)
        self.tokenizer = load_tokenizer(config)
        self.calls = 0
        self.model.get_base_model().register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def answers(self, texts: tuple[str, ...], *stops: str) -> list[list[int]]:
        from finetune.engine.decoding import generate_tokens

        self.calls = 0
        ids = [self.tokenizer.encode(text) for text in texts]
        prompts = EncodedPrompts(
            ids,
            [LIMIT] * len(ids),
            [],
            self.tokenizer.pad_token_id,
            # The tiny base's most likely token is always the same one.
            Sampling(2.0, seed=1),
            stops=StopTexts(self.tokenizer, stops) if stops else None,
        )
        (answers,) = generate_tokens(self.model, [prompts], self.config.quantization)
        return answers

    def text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


@pytest.fixture(params=["allocated cache", "the model's own cache"])
def base(
    tiny: Tiny, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Base:
    if request.param == "the model's own cache":
        monkeypatch.setattr(batch_decoding, "allocate_cache", lambda *_, **__: None)
    return Base(tiny(NONE))


def test_a_stop_text_ends_an_answer_early_and_changes_nothing_before_it(
    base: Base,
) -> None:
    # The first generation probes the base too.
    base.answers(TEXTS[:1])
    (whole,) = base.answers(TEXTS[:1])
    whole_calls = base.calls
    # Of several tokens, within the second look.
    stop = base.text(whole[TOKENS_OF_A_CALL + 2 : TOKENS_OF_A_CALL + 5])
    assert stop not in base.text(whole[:TOKENS_OF_A_CALL])

    (stopped,) = base.answers(TEXTS[:1], "never", stop)

    assert base.calls < whole_calls
    assert stop in base.text(stopped)
    before = base.text(whole).partition(stop)[0]
    assert base.text(stopped).partition(stop)[0] == before


def test_a_stop_text_of_one_answer_changes_none_beside_it(base: Base) -> None:
    whole = base.answers(TEXTS)
    stop = base.text(whole[0][2:5])

    stopped = base.answers(TEXTS, stop)

    for expected, answer in zip(whole, stopped, strict=True):
        before = base.text(expected).partition(stop)[0]
        assert base.text(answer).partition(stop)[0] == before
