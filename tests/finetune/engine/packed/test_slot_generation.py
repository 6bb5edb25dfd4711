"""Generation in slots: each run's answers equal those of the run alone."""

from typing import Any

import pytest
from support.runs import Tiny

from finetune.engine.generation import Sampling
from finetune.engine.steps import drive
from finetune.run.resources import SharedResources

pytestmark = pytest.mark.usefixtures("fresh_cache")

PROMPTS = ["Hm?", "What does math.gcd do in Python, and why?", "Sea, or not?"]
ADAPTERS = (("lora.r=4",), ("lora.r=16", "seed=1"), ("lora/target=q_v", "seed=2"))


def trainings(tiny: Tiny, *overrides: str) -> list[Any]:
    """Runs on one bank whose adapters change what the base says, each in another way."""
    import torch

    from finetune.engine.packed.training import PackedTraining

    resources = SharedResources()
    runs = []
    for number, adapter in enumerate(ADAPTERS):
        config = tiny("quantization=none", *overrides, *adapter)
        slot = resources.bank(config).create_slot(config.lora, config.seed)
        generator = torch.Generator().manual_seed(number)
        slot.vector.copy_(torch.randn(slot.vector.shape, generator=generator) * 0.2)
        rows = resources.tokens("train", resources.rows(config.dataset).train, config)
        runs.append(PackedTraining(config, slot, rows, 1))
    return runs


def together(steps: list[Any]) -> list[list[str]]:
    """Execute the first requests of runs at once, and return the runs' answers."""
    requests = [next(work) for work in steps]
    answers = []
    responses = requests[0].executor.execute(requests)
    for work, response in zip(steps, responses, strict=True):
        assert not isinstance(response, Exception), response
        with pytest.raises(StopIteration) as end:
            work.send(response)
        answers.append(end.value.value)
    return answers


@pytest.mark.parametrize("sampling", [None, Sampling(1.0, 0.9, seed=3)])
def test_answers_of_three_slots_equal_each_alone(
    tiny: Tiny, sampling: Sampling | None
) -> None:
    runs = trainings(tiny)
    counts = (3, 2, 1)
    arguments: dict[str, Any] = {
        "max_new_tokens": 40,
        "max_length": None,
        "sampling": sampling,
    }

    def steps() -> list[Any]:
        return [
            run.generate_answers(PROMPTS[:count], **arguments)
            for run, count in zip(runs, counts, strict=True)
        ]

    alone = [drive(work) for work in steps()]
    assert together(steps()) == alone
    assert [len(answers) for answers in alone] == list(counts)
    assert len({answers[0] for answers in alone}) == 3


def test_no_prompts_and_no_room_give_no_answers(tiny: Tiny) -> None:
    first, second, third = trainings(tiny)
    steps = [
        first.generate_answers([], max_new_tokens=5, max_length=None),
        second.generate_answers(PROMPTS, max_new_tokens=None, max_length=1),
        third.generate_answers(PROMPTS[:1], max_new_tokens=5, max_length=None),
    ]
    answers = together(steps)
    assert answers[:2] == [[], ["", "", ""]]
    assert answers[2][0]


def test_a_neighbours_generation_leaves_the_gradients_as_they_are(tiny: Tiny) -> None:
    import torch

    from finetune.engine.packed.requests import ForwardBackward

    run, neighbour, _ = trainings(tiny, "lora.dropout=0.2")
    slot = run._slot
    batch = [run._rows[0], run._rows[1]]
    request = ForwardBackward(slot, batch, 1.0, 1)
    before = slot.bank.execute([request])[0].loss
    gradient = slot.gradient.clone()
    work = neighbour.generate_answers(PROMPTS, max_new_tokens=20, max_length=None)
    responses = slot.bank.execute([next(work), request])
    assert responses[1].loss == before
    assert torch.equal(slot.gradient, gradient)
