"""The work of an evaluation: tokens that it evaluates, and answers that it generates."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.config.schema import RunConfig
from finetune.metrics.harness import GENERATED, Benchmark
from finetune.metrics.harness_generation import AnswerSettings, read_settings
from finetune.metrics.load import load_benchmarks
from finetune.run.harness_prompts import Documents, document_numbers, prompt_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.data.token_file import Tokens

SAMPLED_DOCUMENTS = 16
"""Documents of a task whose requests are built to estimate those of all."""

STEP_TOKENS = 80
"""A step of generation on a CPU takes as long as an evaluation of so many tokens, and of one more
for each answer (measured with SmolLM2-135M: the first on two cores; 0.9 for each answer from 8 to
32 on one)."""

FIRST_PROMPTS = 2
"""Held-out prompts that are answered where `sample_prompts` gives none."""


@dataclass(frozen=True)
class Generation:
    """Answers that are generated together, each token for all of them at once."""

    answers: int
    steps: int
    """The limit of an answer in tokens."""

    @property
    def step_tokens(self) -> float:
        """A step on a CPU takes as long as an evaluation of so many tokens."""
        return STEP_TOKENS + self.answers


@dataclass(frozen=True)
class Work:
    """What an evaluation computes."""

    tokens: int = 0
    """Tokens of rows and of requests, with the prompts of generated answers."""
    passes: int = 0
    """Passes in which they are evaluated."""
    generations: tuple[Generation, ...] = ()
    documents: int = 0
    """Documents of tasks of lm-evaluation-harness."""

    @property
    def steps(self) -> int:
        """Steps of generation, at most."""
        return sum(generation.steps for generation in self.generations)

    def duration(self, is_gpu: bool) -> float:
        """Return how long it takes, in a unit of its own.

        On a CPU that is the time of an evaluated token; on a GPU, which waits for its host, that of
        a pass, whether of a batch of rows or of a step of generation.
        """
        if is_gpu:
            return self.passes + self.steps
        steps = [
            generation.steps * generation.step_tokens for generation in self.generations
        ]
        return self.tokens + sum(steps)

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.tokens + other.tokens,
            self.passes + other.passes,
            self.generations + other.generations,
            self.documents + other.documents,
        )


def loss_work(config: RunConfig, tokens: "Tokens") -> Work:
    """Return the work of the losses of tokenised rows."""
    passes = -(-len(tokens) // config.trainer.per_device_eval_batch_size)
    return Work(sum(tokens.lengths), passes)


def answer_work(config: RunConfig, tokens: "Tokens") -> Work:
    """Return the work of the answers to rows; none where no metric needs generated answers.

    Prompts are counted with their answers: how long they are by themselves is not known here.
    """
    settings = config.evaluation
    answers = min(len(tokens), settings.limit or len(tokens))
    if not settings.generates or not answers:
        return Work()
    prompts = sum(tokens.lengths[:answers])
    return Work(prompts, 1, (Generation(answers, settings.max_new_tokens),))


def prompt_work(config: RunConfig) -> Work:
    """Return the most work of the answers to the sample prompts, once."""
    prompts = config.sample_prompts
    count = FIRST_PROMPTS if prompts is None else len(prompts)
    steps = config.sample_max_new_tokens or config.sample_max_length or 0
    return Work(generations=(Generation(count, steps),)) if count else Work()


def task_work(
    config: RunConfig, tokenizer: "PreTrainedTokenizerBase", documents: Documents
) -> Work:
    """Return the work of the tasks of lm-evaluation-harness among `evaluation.metrics`.

    The tokens are those of some documents, times the documents: nothing is left out that requests
    have in common, and answers may end before their limit.

    Raises:
        ConfigError: A task can't be used.
    """
    work = Work()
    for benchmark in load_benchmarks(config.evaluation):
        work += _benchmark_work(benchmark, config, tokenizer, documents)
    return work


def _benchmark_work(
    benchmark: Benchmark,
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerBase",
    documents: Documents,
) -> Work:
    from finetune.run.harness import copy_benchmark
    from finetune.run.harness_calls import build_requests
    from finetune.run.harness_model import HarnessModel

    format_of_prompts = prompt_format(config, tokenizer)
    model = HarnessModel(benchmark.path, tokenizer, format_of_prompts, positions=None)
    tokens = 0.0
    likelihoods = 0.0
    documents_count = 0
    answers: dict[AnswerSettings, float] = {}
    for task in copy_benchmark(benchmark).tasks.values():
        limit = config.evaluation.limit
        numbers = document_numbers(len(task.eval_docs), documents, limit)
        documents_count += len(numbers)
        sample = numbers[:: -(-len(numbers) // SAMPLED_DOCUMENTS)]
        scale = len(numbers) / len(sample)
        for request in build_requests(model, task, sample):
            texts = [text for text in request.args if isinstance(text, str)]
            count = scale * request.repeats
            tokens += count * len(model.tok_encode("".join(texts)))
            if request.request_type == GENERATED:
                settings = read_settings(benchmark.path, request.args[1])
                answers[settings] = answers.get(settings, 0.0) + count
            else:
                likelihoods += count
    batch_size = config.trainer.per_device_eval_batch_size
    generations = [
        Generation(round(count), settings.max_tokens)
        for settings, count in answers.items()
    ]
    return Work(
        round(tokens),
        math.ceil(likelihoods / batch_size) + len(generations),
        tuple(generations),
        documents_count,
    )
