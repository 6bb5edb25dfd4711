"""Generation in slots: each run's answers equal those of the run alone."""

from typing import Any

import pytest
from support.configs import compose
from support.matrix import further
from support.runs import NONE, Tiny

from finetune.config.schema import RunConfig
from finetune.data.types import Prompt
from finetune.engine.encoded_prompts import Sampling
from finetune.engine.steps import drive
from finetune.run.resources import SharedResources

PROMPTS = [
    Prompt(text)
    for text in ("Hm?", "What does math.gcd do in Python, and why?", "Sea, or not?")
]
ADAPTERS = (("lora.r=4",), ("lora.r=16", "seed=1"), ("lora/target=q_v", "seed=2"))


class Runs:
    """Runs on one bank whose adapters change what the base says, each in another way."""

    def __init__(self, configs: list[RunConfig], change: float) -> None:
        import torch

        from finetune.engine.packed.training import PackedTraining

        self.resources = SharedResources()
        self.tokenizer = self.resources.tokenizer(configs[0].model)
        self.trainings = []
        for number, config in enumerate(configs):
            slot = self.resources.bank(config).slots.create(config.lora, config.seed)
            generator = torch.Generator().manual_seed(number)
            noise = torch.randn(slot.vector.shape, generator=generator)
            slot.vector.copy_(noise * change)
            rows = self.resources.rows(config.dataset).train
            tokens = self.resources.tokens("train", rows, config)
            self.trainings.append(PackedTraining(config, slot, tokens, 1))

    def steps(self, run: int, prompts: int = len(PROMPTS), **arguments: Any) -> Any:
        training = self.trainings[run]
        return training.generate_answers(PROMPTS[:prompts], self.tokenizer, **arguments)


@pytest.fixture
def tiny_runs(tiny: Tiny, fresh_cache: None) -> Runs:
    configs = [tiny(NONE, *adapter) for adapter in ADAPTERS]
    return Runs(configs, 0.2)


@pytest.fixture
def packaged_runs() -> Runs:
    common = [NONE, "tracker=none", "dataset.limit=24", "optimizer.learning_rate=1e-3"]
    return Runs([compose(*common, *adapter) for adapter in ADAPTERS], 0.02)


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
@pytest.mark.parametrize(
    "runs_fixture",
    ["tiny_runs", *further("packaged_runs")],
)
def test_answers_of_three_slots_equal_each_alone(
    runs_fixture: str, sampling: Sampling | None, request: pytest.FixtureRequest
) -> None:
    runs: Runs = request.getfixturevalue(runs_fixture)
    counts = (3, 2, 1)

    def steps() -> list[Any]:
        return [
            runs.steps(run, count, max_new_tokens=40, sampling=sampling)
            for run, count in enumerate(counts)
        ]

    alone = [drive(work) for work in steps()]
    assert together(steps()) == alone
    assert [len(answers) for answers in alone] == list(counts)
    assert len({answers[0] for answers in alone}) == 3


@pytest.mark.parametrize(
    "runs_fixture",
    ["tiny_runs", pytest.param("packaged_runs", marks=pytest.mark.slow)],
)
def test_answers_of_three_slots_equal_those_of_pefts_own_model(
    runs_fixture: str, request: pytest.FixtureRequest, tmp_path: Any
) -> None:
    """Each prompt by itself, with transformers' `generate`, on a base of its own."""
    from peft import PeftModel

    from finetune.data.encoding import Encoder
    from finetune.model.loading import load_base

    runs: Runs = request.getfixturevalue(runs_fixture)
    answers = together([runs.steps(run, max_new_tokens=40) for run in range(3)])
    for run, training in enumerate(runs.trainings):
        config = training._config
        training.model.save_pretrained(tmp_path / str(run))
        base = load_base(runs.resources.source(config.model), config)
        model = PeftModel.from_pretrained(base, str(tmp_path / str(run))).eval()
        encoder = Encoder(runs.tokenizer, {})
        for prompt, answer in zip(PROMPTS, answers[run], strict=True):
            import torch

            ids = torch.tensor([encoder.encode_prompt(prompt)])
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=40,
                do_sample=False,
                eos_token_id=encoder.ends,
                pad_token_id=runs.tokenizer.pad_token_id,
            )
            new_tokens = output[0, ids.shape[1] :]
            text = runs.tokenizer.decode(new_tokens, skip_special_tokens=True)
            assert answer == text.strip()


def test_an_answer_is_drawn_anew_with_another_seed_alone(tiny_runs: Runs) -> None:
    first, again, other = [
        drive(tiny_runs.steps(0, max_new_tokens=20, sampling=Sampling(1.0, seed=seed)))
        for seed in (1, 1, 2)
    ]
    assert first == again
    assert first != other


def test_no_prompts_and_no_room_give_no_answers(tiny_runs: Runs) -> None:
    steps = [
        tiny_runs.steps(0, 0, max_new_tokens=5),
        tiny_runs.steps(1, max_new_tokens=None, max_length=1),
        tiny_runs.steps(2, 1, max_new_tokens=5),
    ]
    answers = together(steps)
    assert answers[:2] == [[], ["", "", ""]]
    assert answers[2][0]


def test_a_neighbours_generation_leaves_the_gradients_as_they_are(
    tiny: Tiny, fresh_cache: None
) -> None:
    import torch

    from finetune.engine.packed.requests import ForwardBackward

    runs = Runs(
        [tiny(NONE, "lora.dropout=0.2", f"seed={seed}") for seed in (0, 1)],
        0.2,
    )
    run = runs.trainings[0]
    slot = run._slot
    batch = [run._rows[0], run._rows[1]]
    request = ForwardBackward(slot, batch, 1.0, 1)
    before = slot.bank.execute([request])[0].loss
    gradient = slot.gradient.clone()
    work = runs.steps(1, max_new_tokens=20)
    responses = slot.bank.execute([next(work), request])
    assert responses[1].loss == before
    assert torch.equal(slot.gradient, gradient)
