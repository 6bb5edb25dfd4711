"""Generation: stopping, batches, padding, length limits."""

from pathlib import Path
from typing import Any

import pytest
from support.models import SHORT_ROWS, collate, load_tokenizer, short_tokens
from support.runs import Tiny

from finetune.config.schema import RunConfig

pytestmark = pytest.mark.usefixtures("fresh_cache")


@pytest.fixture(scope="module")
def overfit(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, Any, Any]:
    """A config, the tiny base that has learnt the short rows by heart (all its weights trained),
    its tokenizer."""
    import torch
    from support.configs import compose, tiny_overrides

    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    config = compose(*tiny_overrides(tiny_base), "quantization=none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        model, tokenizer = (
            load_base(find_base(config.model), config),
            load_tokenizer(config),
        )
        batch = collate(list(short_tokens(config, tokenizer)), tokenizer)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            break
    assert loss.item() < 0.01
    return config, model, tokenizer


def answers(
    overfit: tuple[RunConfig, Any, Any],
    prompts: list[str],
    max_length: int | None = None,
    max_new_tokens: int | None = None,
) -> list[str]:
    from finetune.engine.generation import generate_answers

    config, model, tokenizer = overfit
    return generate_answers(
        model,
        tokenizer,
        prompts,
        config.quantization,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
    )


def test_generation_stops_by_itself_although_the_padding_is_the_end_token(
    overfit: tuple[RunConfig, Any, Any],
) -> None:
    assert overfit[2].pad_token_id == overfit[2].eos_token_id
    for question, expected in SHORT_ROWS:
        assert answers(overfit, [question], 400) == [expected]


def test_what_ends_an_answer_is_the_end_token_itself(
    overfit: tuple[RunConfig, Any, Any],
) -> None:
    import torch

    _, model, tokenizer = overfit
    question, expected = SHORT_ROWS[0]
    chat = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    ids += tokenizer(expected)["input_ids"]
    with torch.no_grad():
        following = model.eval()(input_ids=torch.tensor([ids])).logits[0, -1]
    assert following.argmax() == tokenizer.eos_token_id


def test_answers_of_a_batch_equal_single_answers(
    overfit: tuple[RunConfig, Any, Any],
) -> None:
    questions = [question for question, _ in SHORT_ROWS] + [
        "Something never seen, and rather longer than the others?"
    ]
    single = [answers(overfit, [question], 100)[0] for question in questions]
    assert answers(overfit, questions, 100) == single
    assert answers(overfit, questions[::-1], 100) == single[::-1]
    assert single[:3] == [expected for _, expected in SHORT_ROWS]


def test_padding_is_not_attended_to(tiny: Tiny) -> None:
    import torch

    from finetune.engine.generation import generate_answers
    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    config = tiny("quantization=none")
    model, tokenizer = (
        load_base(find_base(config.model), config),
        load_tokenizer(config),
    )
    with torch.no_grad():  # so sharp that whatever is attended to changes what is said
        for name, weight in model.named_parameters():
            weight.mul_(1 if "norm" in name else 8)
    questions = [
        "Hm?",
        "What does math.gcd do in Python, and why would anybody ask for it?",
        "Sea, or not?",
    ]
    bounds = {"max_new_tokens": 60, "max_length": 90}
    single = [
        generate_answers(model, tokenizer, [question], config.quantization, **bounds)[0]
        for question in questions
    ]
    assert len(set(single)) == 3
    assert min(map(len, single)) > 20
    assert (
        generate_answers(model, tokenizer, questions, config.quantization, **bounds)
        == single
    )


def test_max_length_counts_prompt_and_answer_of_each_row_by_itself(
    overfit: tuple[RunConfig, Any, Any],
) -> None:
    tokenizer = overfit[2]
    (short, _), (long, _), (question, expected) = SHORT_ROWS
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    whole = tokenizer(expected)["input_ids"]
    for kept in (1, 5, len(whole)):
        cut = tokenizer.decode(whole[:kept]).strip()
        assert answers(overfit, [question], len(prompt) + kept) == [cut]
        assert answers(overfit, [short, question, long], len(prompt) + kept)[1] == cut


@pytest.mark.parametrize(
    ("max_new_tokens", "room", "expected"),
    [(3, None, 3), (3, 5, 3), (5, 3, 3), (None, 3, 3), (4, 4, 4), (1, None, 1)],
)
@pytest.mark.parametrize("length", ["short", "long"])
def test_an_answer_keeps_both_bounds_whatever_its_prompts_length(
    overfit: tuple[RunConfig, Any, Any],
    length: str,
    max_new_tokens: int | None,
    room: int | None,
    expected: int,
) -> None:
    """`room` is what the bound of prompt and answer together leaves for the answer."""
    _, model, tokenizer = overfit
    prompt = SHORT_ROWS[0][0] if length == "short" else SHORT_ROWS[0][0] * 10
    ids = prompt_ids(tokenizer, prompt)
    written: list[int] = []
    generate = model.generate

    def count(**arguments: Any) -> Any:
        tokens = generate(**arguments | {"eos_token_id": None})
        written.append(tokens.shape[1] - arguments["input_ids"].shape[1])
        return tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate", count)
        answers(
            overfit, [prompt], None if room is None else len(ids) + room, max_new_tokens
        )

    assert written == [expected]


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    chat = [{"role": "user", "content": prompt}]
    ids: list[int] = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    return ids


def test_a_prompt_that_reaches_the_length_alone_gets_no_answer_and_one_line_says_so(
    overfit: tuple[RunConfig, Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (short, expected), long = SHORT_ROWS[0], SHORT_ROWS[0][0] * 10
    length = len(prompt_ids(overfit[2], long))

    assert answers(overfit, [long, short], max_length=length) == ["", expected]

    assert caplog.messages == [
        f"a prompt of {length} tokens gets no answer: prompt and answer together have {length}"
    ]


def test_answers_stay_within_the_models_positions(
    tiny: Tiny, tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """GPT-2 has a weight for each position, and fails past the last."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from finetune.engine.generation import generate_answers

    config = tiny("quantization=none")
    tokenizer = load_tokenizer(config)
    torch.manual_seed(0)
    shapes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128}
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None, **shapes
        )
    )
    lengths = {
        prompt: len(prompt_ids(tokenizer, prompt))
        for prompt in ("Hm?", "Hm? " * 6, "Hm? " * 70)
    }
    short, middle, long = lengths
    assert lengths[middle] + 100 > 128 > lengths[short] + 100

    bounds: dict[str, Any] = {"max_new_tokens": 100, "max_length": None}
    single = [
        generate_answers(model, tokenizer, [prompt], config.quantization, **bounds)[0]
        for prompt in lengths
    ]
    lines = list(caplog.messages)
    together = generate_answers(
        model, tokenizer, list(lengths), config.quantization, **bounds
    )

    assert together == single
    assert [bool(text) for text in together] == [True, True, False]
    left = {lengths[middle]: 128 - lengths[middle], lengths[long]: 0}
    assert lines == [
        f"a prompt of {length} tokens leaves {room} for its answer: the model has 128 positions"
        for length, room in left.items()
    ]
    assert caplog.messages == lines * 2


def test_answering_leaves_the_mode_and_the_random_numbers_alone(
    overfit: tuple[RunConfig, Any, Any],
) -> None:
    import torch

    model = overfit[1]
    for mode in (True, False):
        model.train(mode)
        before = torch.get_rng_state()
        answers(overfit, ["Sea?"], 60)
        assert {module.training for module in model.modules()} == {mode}
        assert torch.equal(torch.get_rng_state(), before)
