"""Tasks for lm-evaluation-harness in a folder, short runs with them, and the harness's own values."""

from pathlib import Path
from typing import Any

from support.rows import chat
from support.runs import write_jsonl

DOCUMENTS = 11

HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
CHOICES = """
output_type: multiple_choice
doc_to_text: "Is {{number}} even?"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "The number {{number}} is a whole number."
metric_list:
  - {metric: bits_per_byte, higher_is_better: false}
"""
ANSWERS = """
output_type: generate_until
doc_to_text: "{{number}}?"
doc_to_target: "yes"
"""
GENERATED = f"""
{ANSWERS}
description: "Answer."
num_fewshot: 2
fewshot_config: {{sampler: default, split: test}}
generation_kwargs: {{until: ["e", " th"], max_gen_toks: 20, do_sample: false}}
process_results: !function scoring.process
metric_list:
  - {{metric: code, aggregation: mean, higher_is_better: true}}
  - {{metric: letters, aggregation: mean, higher_is_better: false}}
filter_list:
  - {{name: whole, filter: [{{function: take_first}}]}}
  - {{name: word, filter: [{{function: regex, regex_pattern: '(\\w+)'}}, {{function: take_first}}]}}
"""
SCORING = """
def process(document, results):
    text = results[0]
    return {"code": float(sum(map(ord, text))), "letters": float(len(text))}
"""
EXACT = f"""
{ANSWERS}
generation_kwargs: {{until: ["\\n"], max_gen_toks: 3}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
SAMPLED = f"""
{ANSWERS}
generation_kwargs: {{until: [], max_gen_toks: 8, do_sample: true, temperature: 2.0, top_p: 0.9}}
process_results: !function scoring.process
metric_list:
  - {{metric: code, aggregation: mean, higher_is_better: true}}
"""
WIDE = GENERATED.replace('" th"], max_gen_toks: 20', '"?"], max_gen_toks: 500')
"""The tiny base has 512 positions."""
TASKS = {
    "parity": CHOICES,
    "text": ROLLING,
    "said": GENERATED,
    "exact": EXACT,
    "wide": WIDE,
    "drawn": SAMPLED,
    "few": CHOICES + "tag: [numbers]\nprocess_docs: !function scoring.first_four\n",
    "beams": ANSWERS
    + "generation_kwargs: {num_beams: 4}\nmetric_list: [{metric: exact_match}]\n",
    "hot": ANSWERS
    + "generation_kwargs: {do_sample: true}\nmetric_list: [{metric: exact_match}]\n",
    "long": ANSWERS
    + "generation_kwargs: {max_gen_toks: 100000}\nmetric_list: [{metric: exact_match}]\n",
    "code": ANSWERS + "unsafe_code: true\nmetric_list: [{metric: exact_match}]\n",
}
GROUPS = {
    "weighted": "[parity, few]",
    "even": "[parity, few]",
    "mixed": "[parity, said]",
}


def write_tasks(folder: Path) -> Path:
    """Write tasks and groups of tasks, and their documents; return their folder."""
    tasks = folder / "tasks"
    tasks.mkdir()
    rows = [{"number": 7 * n, "label": n % 3 % 2} for n in range(DOCUMENTS)]
    file = write_jsonl(folder / "documents.jsonl", rows)
    functions = (
        SCORING
        + "\ndef first_four(documents):\n    return documents.select(range(4))\n"
    )
    (tasks / "scoring.py").write_text(functions)
    for name, text in TASKS.items():
        head = HEAD.format(name=name, file=file)
        (tasks / f"{name}.yaml").write_text(head + text)
    for name, members in GROUPS.items():
        text = f"group: {name}\ntask: {members}\n"
        if name != "mixed":
            weight = str(name == "weighted").lower()
            text += "aggregate_metric_list:\n"
            for metric in ("acc_norm", "acc"):
                text += f"  - {{metric: {metric}, weight_by_size: {weight}}}\n"
        (tasks / f"{name}.yaml").write_text(text)
    return tasks


def short_overrides(folder: Path) -> list[str]:
    """Return the overrides of a short run in a folder that has tasks."""
    rows = [chat(f"{n}?", "yes") for n in range(40)]
    file = write_jsonl(folder / "rows.jsonl", rows)
    return [
        f"dataset.path={file}", "dataset.limit=null", "dataset.eval_fraction=0.1",
        "dataset.test_fraction=0.1", "trainer.max_steps=4", "trainer.eval_steps=2",
        "optimizer.learning_rate=1e-2", "sample_prompts=[]", "quantization=none",
        f"evaluation.harness_path={folder / 'tasks'}",
    ]  # fmt: skip


def by_the_harness_itself(
    folder: Path, task: str, samples: dict[str, list[int]], has_template: bool = True
) -> Any:
    """Evaluate a finished run by the harness's own class for transformers' models."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from finetune.run.load import load_run

    loaded = load_run(folder)
    model = loaded.with_adapter().eval()
    results: Any = simple_evaluate(
        HFLM(pretrained=model, tokenizer=loaded.tokenizer),
        tasks=[task],
        samples=samples,
        bootstrap_iters=0,
        task_manager=TaskManager(
            include_path=folder.parent / "tasks", include_defaults=False
        ),
        apply_chat_template=has_template,
    )
    return results["results"][task]
