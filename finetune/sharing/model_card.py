"""The model card of a run: what it was trained on, how, with which result, and how to use it.

Its text is `model_card.md.jinja`. Row text stands in it with samples alone.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from finetune.config.flatten import flatten
from finetune.config.schema import RunConfig
from finetune.files.atomic import read_json, read_json_list
from finetune.files.run_folder import RunFolder
from finetune.run.load import read_run_config
from finetune.sharing.base_license import CardBase, find_base_card
from finetune.sharing.card_data import data_lines, hub_datasets
from finetune.sharing.card_metrics import SPLITS, CardMetric, card_metrics
from finetune.sharing.public_values import public_parameter
from finetune.sharing.usage import card_usage

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

RECIPE = (
    "lora.",
    "quantization.",
    "optimizer.",
    "trainer.",
    "dataset.max_length",
    "dataset.packing",
    "dataset.loss_on",
)
"""Beginnings of the config keys that a card shows."""

NO_RECIPE = ("trainer.logging_steps", "trainer.save_steps")
"""Keys that change no number."""

RESULT = (
    "status",
    "step",
    "effective_batch_size",
    "train_tokens",
    "train_seconds",
    "engine",
    "versions",
)
"""Entries of `result.json` that a card shows; a run of an earlier version may lack some."""

TASK = "text-generation"


@dataclass(frozen=True)
class ModelCard:
    """A card as it is published, with the files of the base's licence."""

    text: str
    base: CardBase


def make_model_card(
    run: RunFolder,
    repository: str,
    samples: bool,
    sections: Sequence[str] = (),
    tags: Sequence[str] = (),
) -> ModelCard:
    """Write the card of a run.

    Args:
        run: The run folder.
        repository: Where it is published, as `owner/name`.
        samples: Whether the card shows the run's sample prompts and answers.
        sections: Further sections in Markdown, which follow the metrics.
        tags: Further tags.
    """
    config = read_run_config(run.path)
    result = read_json(run.result) or {}
    base = find_base_card(run, config)
    metrics = card_metrics(run)
    template = environment("finetune.sharing").get_template("model_card.md.jinja")
    body = template.render(
        repository=repository,
        name=repository.rpartition("/")[2],
        base=base,
        data=data_lines(config),
        fingerprint=result.get("dataset_fingerprint"),
        rows=result.get("rows") or {},
        metrics=metrics,
        splits=SPLITS,
        sections=sections,
        recipe=list(_recipe(config)),
        hides_template=config.dataset.template is not None
        or config.model.chat_template is not None,
        result={name: result.get(name) for name in RESULT},
        quantization=config.quantization,
        usage=card_usage(run, config, base, repository),
        own_chat_template=config.model.chat_template is not None,
        samples=read_json_list(run.samples) if samples else [],
        has_chat_template=(run.adapter / "chat_template.jinja").is_file(),
    )
    return ModelCard(f"---\n{_yaml(config, base, metrics, tags)}\n---\n\n{body}", base)


def environment(package: str) -> Environment:
    """Return a Jinja environment for the Markdown templates of a package.

    A name that a template misspells is an error instead of an empty place.
    """
    made = Environment(
        loader=PackageLoader(package, ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["cell"] = cell
    made.filters["fenced"] = fenced
    made.filters["python"] = repr
    # JSON's texts are Python's too.
    made.filters["quoted"] = partial(json.dumps, ensure_ascii=False)
    return made


def cell(value: object) -> str:
    """Return a value as a cell of a Markdown table: on one line, without the table's marks."""
    return " ".join(str(value).split()).replace("|", "\\|")


def fenced(text: str) -> str:
    """Return a text as a code block, whose fence is longer than any in the text."""
    runs = re.findall(r"`{3,}", text)
    fence = "`" * (max(map(len, runs), default=2) + 1)
    return f"{fence}text\n{text.strip()}\n{fence}"


def _recipe(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the keys of the recipe with their values.

    Those that are null, false or empty are left out.
    """
    yield "seed", str(config.seed)
    is_4bit = config.quantization.load_in_4bit
    for key, value in flatten(config.to_dict()).items():
        if not key.startswith(RECIPE) or key in NO_RECIPE:
            continue
        is_unset = value is None or value is False or value in ([], {}, "")
        is_idle = key.startswith("quantization.bnb_4bit") and not is_4bit
        if not is_unset and not is_idle:
            yield key, public_parameter(key, value)


def _yaml(
    config: RunConfig,
    base: CardBase,
    metrics: Sequence[CardMetric],
    tags: Sequence[str],
) -> str:
    """Return the fields by which the hub finds and shows an adapter."""
    from huggingface_hub import ModelCardData

    is_quantized = config.quantization.load_in_4bit or config.quantization.load_in_8bit
    data = ModelCardData(
        # The hub takes only its own models and data sets here.
        base_model=base.name if base.is_on_hub else None,
        datasets=hub_datasets(config.dataset) or None,
        library_name="peft",
        pipeline_tag=TASK,
        license=base.license,
        license_name=base.license_name,
        license_link=base.license_link,
        tags=["lora", *(["qlora"] if is_quantized else []), "qlora-sweeps", *tags],
        model_name=config.name,
        eval_results=_eval_results(config, metrics) or None,
    )
    return data.to_yaml().rstrip()


def _eval_results(
    config: RunConfig, metrics: Sequence[CardMetric]
) -> "list[EvalResult]":
    """Return the metrics of the test rows as the hub reads them."""
    from huggingface_hub import EvalResult

    datasets = hub_datasets(config.dataset)
    kind, dataset = (datasets[0], datasets[0]) if datasets else ("local", "test rows")
    results = []
    for metric in metrics:
        if not metric.name.startswith("test/"):
            continue
        arguments: dict[str, Any] = {}
        if metric.interval is not None:
            arguments["metric_args"] = {"interval_95": list(metric.interval)}
        results.append(
            EvalResult(
                task_type=TASK,
                dataset_type=kind,
                dataset_name=dataset,
                dataset_split="test",
                metric_type=metric.name.removeprefix("test/"),
                metric_name=metric.name,
                metric_value=metric.value,
                **arguments,
            )
        )
    return results
