"""Bad input ends in one line that names the key, the value and what is allowed, with exit code 1, before torch loads.

Every case is a whole command in a process of its own. Expected lines are written with … for any text.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bad_input import Case, Outcome, Workplace, each, lines, matches
from support.configs import compose

WEIGHTS_LOAD = "no GPU: training on the CPU"
"""Logged on a CPU right before a base's weights load."""


SECRET = "hf_abcdefSECRETghijkl"


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    cwd, aside = tmp_path / "cwd", tmp_path / "aside"
    cwd.mkdir()
    aside.mkdir()
    return Workplace(cwd, aside)


CONFIG = [
    Case("choice", "model=llama2", "model=llama2: …did you mean llama2_7b…allowed: gemma3_4b, …smollm2_135m…"),
    Case("nested-choice", "lora/target=qv", "lora/target=qv: …did you mean q_v? allowed: all_linear, attention, q_v"),
    Case("experiment", "experiment=llama_guanaco", "experiment=llama_guanaco: …did you mean llama2_guanaco?…"),
    Case("choice-that-is-a-number", "lora=8", "lora=8: …r8…"),
    Case("key", "lora.alhpa=8", "lora.alhpa: no such key; did you mean alpha? allowed: alpha, bias, dropout…"),
    Case("added-key", "+lora.rank=8", "lora.rank: no such key;…allowed: alpha, bias, …use_rslora"),
    Case("added-group", "+optimiser.name=sgd", "optimiser: no such key; did you mean optimizer…allowed: dataset, …"),
    Case("top-level-key", "sede=1", "sede: no such key; did you mean seed…"),
    Case("key-below-a-value", "seed.value=1", "seed.value: no such key…"),
    Case("flag", "--frobnicate", "unrecognized arguments: --frobnicate; see --help"),
    Case("word", "frobnicate", "…frobnicate…EQUAL…"),
    Case("interpolation", "name=${nope}", "…nope…"),
    Case("config-folder", "--config-dir nowhere", "…nowhere…"),
    Case("text-for-a-whole-number", "lora.r=abc", "lora.r=abc: must be a whole number"),
    Case("fraction-for-a-whole-number", "trainer.max_steps=1.5", "trainer.max_steps=1.5: must be a whole number"),
    Case("boolean-for-a-whole-number", "lora.r=true", "lora.r=true: must be a whole number"),
    Case("text-for-a-boolean", "lora.use_dora=maybe", "lora.use_dora=maybe: must be true or false"),
    Case("number-for-a-boolean", "trainer.group_by_length=1", "trainer.group_by_length=1: must be true or false"),
    Case("null-for-a-number", "lora.r=null", "lora.r=null: must be a whole number"),
    Case("value-for-a-group", "lora.extra=5", "lora.extra=5: must be a group of keys"),
    Case("list-with-a-wrong-item", "lora.target_modules=[1.5]", "lora.target_modules=[1.5]: must be text or a list…"),
    Case("r-zero", "lora.r=0", "lora.r=0: must be a whole number of at least 1"),
    Case("r-negative", "lora.r=-4", "lora.r=-4: must be a whole number of at least 1"),
    Case("no-targets", "lora.target_modules=[]", "lora.target_modules=[]: must be all-linear or a list…"),
    Case("dropout-one", "lora.dropout=1.0", "lora.dropout=1.0: must be at least 0 and below 1"),
    Case("dropout-negative", "lora.dropout=-0.1", "lora.dropout=-0.1: must be at least 0 and below 1"),
    Case("rate-zero", "optimizer.learning_rate=0", "optimizer.learning_rate=0…: must be above 0"),
    Case("rate-negative", "optimizer.learning_rate=-1e-4", "optimizer.learning_rate=-0.0001: must be above 0"),
    Case("rate-text", "optimizer.learning_rate=fast", "optimizer.learning_rate=fast: must be a number or null"),
    Case("rate-nan", "optimizer.learning_rate=nan", "optimizer.learning_rate=nan: must be a number or null"),
    Case("rate-infinite", "optimizer.learning_rate=inf", "optimizer.learning_rate=inf: must be a number or null"),
    Case(
        "both-4-and-8-bit",
        "quantization=nf4 quantization.load_in_8bit=true",
        "quantization.load_in_8bit=true: load_in_4bit is true as well…",
    ),
    Case(
        "quant-type",
        "quantization.bnb_4bit_quant_type=nf3",
        "quantization.bnb_4bit_quant_type=nf3: did you mean nf4…allowed: fp4, nf4",
    ),
    Case("dtype", "model.dtype=bf16", "model.dtype=bf16: …allowed: auto, bfloat16, float16, float32"),
    Case(
        "optimizer",
        "optimizer.name=adamw_tork",
        "optimizer.name=adamw_tork: did you mean adamw_torch…allowed: adafactor, …",
    ),
    Case(
        "schedule",
        "optimizer.lr_scheduler_type=cosin",
        "optimizer.lr_scheduler_type=cosin: did you mean cosine…allowed: constant, …",
    ),
    Case(
        "format",
        "dataset.format=chatml",
        "dataset.format=chatml: did you mean chat? allowed: alpaca, auto, chat, …text",
    ),
    Case("metric", "objective=eval/los", "objective=eval/los: did you mean eval/loss…allowed: adapter/parameters, …"),
    Case("metric-in-a-list", "objective=[eval/loss,eval/f1]", "objective=…eval/f1…eval/accuracy…"),
    Case("engine", "trainer.engine=trk", "trainer.engine=trk: …allowed: …trl"),
    Case("tracker", "tracker.name=mlflow", "tracker.name=mlflow: allowed: both, none, tensorboard, wandb"),
    Case("no-path", "dataset=local", "dataset.path: must be given, as dataset.path=…"),
    Case(
        "fractions-sum-to-one",
        "dataset.eval_fraction=0.5 dataset.test_fraction=0.5",
        "dataset.test_fraction=0.5: with eval_fraction=0.5 leaves no rows to train on",
    ),
    Case("fraction-of-one", "dataset.eval_fraction=1", "dataset.eval_fraction=1…: must be at least 0 and below 1…"),
    Case("no-rows-wanted", "dataset.limit=0", "dataset.limit=0: must be a whole number of at least 1, or null"),
    Case(
        "packing-without-a-length",
        "dataset.packing=true dataset.max_length=null",
        "dataset.packing=true: needs dataset.max_length",
    ),
    Case("steps-zero", "trainer.max_steps=0", "trainer.max_steps=0: must be at least 1, or -1…"),
    Case(
        "steps-neither-whole-nor-share",
        "trainer.eval_steps=2.5",
        "trainer.eval_steps=2.5: must be a whole number of steps, a share of them from 0.001 to below 1, or 0…",
    ),
    Case("steps-in-a-list", "trainer.eval_steps=[0.1,-1]", "trainer.eval_steps=[0.1, -1…]: …; or a list of those"),
    Case("a-share-too-small", "trainer.save_steps=1e-9", "trainer.save_steps=1e-09: …from 0.001 to below 1…"),
    Case("checkpoints-in-a-list", "trainer.save_steps=[1,2]", "trainer.save_steps=…"),
    Case("seed", "seed=-1", "seed=-1: must be a whole number from 0 to 4294967295"),
    Case("name-is-a-path", "name=../x", "name=../x: …letters, digits…"),
    Case("name-is-dots", "name=..", "name=..: …letters, digits…"),
    Case(
        "best-without-held-out-rows",
        "objective_at=best dataset.eval_fraction=0",
        "objective_at=best: needs held-out rows: dataset.eval_fraction above 0, or dataset.eval_path",
    ),
    Case(
        "best-by-a-training-metric",
        "objective_at=best objective=train/loss",
        "objective=train/loss: …objective_at=best…one of eval/loss, eval/accuracy",
    ),
    Case("resume", "resume=nowhere", "nowhere: is no run folder…"),
    Case("empty-prompt", "sample_prompts=['']", "sample_prompts=['']: must be texts that are not empty, or null"),
    Case(
        "schedule",
        "optimizer.lr_scheduler_type=cosine_with_min_lr",
        "optimizer.lr_scheduler_type=…trainer.extra.lr_scheduler_kwargs",
    ),
    Case("pissa-on-4-bit", "lora.init_lora_weights=pissa", "lora.init_lora_weights=pissa: …quantization=none"),
    Case("resume-nothing", "resume=", "resume=: must be a run folder"),
    Case("resume-added", "++resume=nowhere", "nowhere: is no run folder…"),
]


@each(CONFIG)
def test_a_bad_config_is_one_line_and_leaves_nothing(case: Case, workplace: Workplace) -> None:
    outcome = workplace.call(*case.arguments.split())

    assert matches(case.says, outcome.error), outcome.error
    assert outcome.stderr == f"error: {outcome.error}\n"
    assert outcome.stdout == ""
    assert not outcome.torch_imported
    assert workplace.files() == set()


def test_a_multiruns_failed_job_is_said_and_ends_in_one_line(workplace: Workplace) -> None:
    outcome = workplace.call("-m", "lora.r=abc")

    assert outcome.error == "1 failed; job 0: lora.r=abc: must be a whole number"
    assert not outcome.torch_imported


def test_a_prompt_that_speaks_of_tokens_is_no_secret(workplace: Workplace) -> None:
    outcome = workplace.call('sample_prompts=["What does token: mean?"]', "lora.r=0")

    assert outcome.error.startswith("lora.r=0")


SECRETS = {
    "key": f"+model.extra.token={SECRET}",
    "dictionary": f"++model.extra={{token:{SECRET}}}",
    "other-section": f"+trainer.extra.hub_token={SECRET}",
    "unknown-key": f"tracker.api_key={SECRET}",
    "hydras-environment": f"+hydra.job.env_set.HF_TOKEN={SECRET}",
    "hydras-environment-as-dictionary": f"+hydra.job.env_set={{WANDB_API_KEY:{SECRET}}}",
    "multirun": f"-m +model.extra={{token:{SECRET}}}",
    "folder-in-use": f"hydra.run.dir=run +model.extra={{token:{SECRET}}}",
}


@pytest.mark.parametrize("arguments", SECRETS.values(), ids=SECRETS)
def test_a_secret_on_the_command_line_reaches_no_file_and_no_output(arguments: str, workplace: Workplace) -> None:
    workplace.write({"run/notes.txt": "older than the command"})

    outcome = workplace.call(*arguments.split(), "dataset.path=missing.jsonl")

    holders = [path for path in workplace.cwd.rglob("*") if path.is_file() and SECRET in path.read_text()]
    assert holders == []
    assert SECRET not in outcome.stdout + outcome.stderr
    assert matches("…: a credential in a config would be written to files; set HF_TOKEN or …", outcome.error)
    assert not outcome.torch_imported


@pytest.mark.parametrize("folder", ["/proc/nope/x", "file/x"])
def test_a_folder_that_cannot_be_made_is_named_with_its_key(folder: str, workplace: Workplace) -> None:
    workplace.write({"file": "regular"})

    outcome = workplace.call(f"hydra.run.dir={folder}")

    assert matches(f"hydra.run.dir={folder}: …", outcome.error), outcome.error
    assert outcome.stderr == f"error: {outcome.error}\n"
    assert not outcome.torch_imported
    assert workplace.files() == {"file"}


ROWS = lines(*({"text": f"Row {number} says something."} for number in range(20)))


ANY_FILE = "allowed: python_docs, a hub id (owner/name), a .jsonl .json .csv .parquet file, a folder"


DATA = [
    Case("no-file", "dataset.path=no.jsonl", f"dataset.path=no.jsonl: no such file or folder; {ANY_FILE}"),
    Case(
        "no-eval-file", "dataset.eval_path=./no.csv", f"dataset.eval_path=./no.csv: no such file or folder; {ANY_FILE}"
    ),
    Case(
        "a-kind-not-read",
        "dataset.path=d.txt",
        "dataset.path=d.txt: must be a .jsonl .json .csv .parquet file",
        {"d.txt": ROWS},
    ),
    Case(
        "folder-without-data",
        "dataset.path=data",
        "dataset.path=data: the folder has no .jsonl .json .csv .parquet file",
        {"data/notes.txt": "x"},
    ),
    Case("empty-file", "", "dataset.path=d.jsonl: the file is empty", {"d.jsonl": ""}),
    Case("blank-file", "", "dataset.path=d.jsonl: holds no rows", {"d.jsonl": "\n\n"}),
    Case(
        "broken-line",
        "",
        "dataset.path=d.jsonl: line 21 is no whole JSON object (…); a .jsonl file holds one object on each line",
        {"d.jsonl": ROWS + '{"text": "cut\n'},
    ),
    Case(
        "pretty-printed",
        "",
        "dataset.path=d.jsonl: line 1 is no whole JSON object (…); a .jsonl file holds one object on each line",
        {"d.jsonl": '{\n  "text": "a"\n}\n'},
    ),
    Case(
        "one-object",
        "dataset.path=d.json",
        "dataset.path=d.json: line 1 is no whole JSON object (…); a .json file holds a list of objects, or one object…",
        {"d.json": '{\n  "text": "a"\n}\n'},
    ),
    Case(
        "row-in-a-folder",
        "dataset.path=data",
        "dataset.path=data/b.jsonl: row 2: field 'text' is no text but int",
        {"data/a.jsonl": ROWS, "data/b.jsonl": lines({"text": "fine"}, {"text": 5})},
    ),
    Case(
        "broken-list",
        "dataset.path=d.json",
        "dataset.path=d.json: line 3 is broken JSON (…)",
        {"d.json": '[\n{"text": "a"},\n{"text" "b"}]'},
    ),
    Case(
        "line-that-is-no-object",
        "",
        "dataset.path=d.jsonl: line 21 is no JSON object; a .jsonl file holds one object on each line",
        {"d.jsonl": ROWS + '["text"]\n'},
    ),
    Case(
        "no-text-field",
        "",
        "dataset.text_field=text: dataset.path=d.jsonl has no such field…its fields: body, title",
        {"d.jsonl": lines({"body": "b", "title": "t"})},
    ),
    Case(
        "no-named-text-field",
        "dataset.format=text dataset.text_field=body",
        "dataset.path=d.jsonl: row 1 has no field 'body'; its fields: text",
    ),
    Case(
        "text-field-missing-later",
        "",
        "dataset.path=d.jsonl: row 21 has no field 'text'; its fields: tekst",
        {"d.jsonl": ROWS + lines({"tekst": "a"})},
    ),
    Case(
        "wrong-type",
        "",
        "dataset.path=d.jsonl: row 21: field 'text' is no text but int",
        {"d.jsonl": ROWS + lines({"text": 5})},
    ),
    Case(
        "no-chat",
        "dataset.format=chat",
        "dataset.path=d.jsonl: row 1 has no list 'messages' or 'conversations'; its fields: text",
    ),
    Case(
        "message-without-content",
        "",
        "dataset.path=d.jsonl: row 1: a message must have 'role' and 'content'…",
        {"d.jsonl": lines({"messages": [{"role": "user"}]})},
    ),
    Case(
        "message-that-is-text",
        "",
        "dataset.path=d.jsonl: row 1: a message must have 'role' and 'content'…",
        {"d.jsonl": lines({"messages": ["hello"]})},
    ),
    Case(
        "no-completion",
        "dataset.format=prompt_completion",
        "dataset.path=d.jsonl: row 1 has no field 'completion'; its fields: prompt",
        {"d.jsonl": lines({"prompt": "p"})},
    ),
    Case(
        "no-output",
        "dataset.format=alpaca",
        "dataset.path=d.jsonl: row 1 has no field 'output'; its fields: instruction",
        {"d.jsonl": lines({"instruction": "p"})},
    ),
    Case(
        "csv-without-the-field",
        "dataset.path=d.csv",
        "dataset.text_field=text: dataset.path=d.csv has no such field…its fields: id, body",
        {"d.csv": "id,body\n1,hello\n"},
    ),
    Case("csv-short-of-a-header", "dataset.path=d.csv", "dataset.path=d.csv: holds no rows", {"d.csv": "text\n"}),
    Case(
        "corrupt-parquet",
        "dataset.path=d.parquet",
        "dataset.path=d.parquet: no readable Parquet file (…)",
        {"d.parquet": b"PAR1 but not really PAR1"},
    ),
    Case(
        "latin-1", "", "dataset.path=d.jsonl: is not UTF-8 text (…)", {"d.jsonl": '{"text": "ä"}\n'.encode("latin-1")}
    ),
    Case(
        "latin-1-csv",
        "dataset.path=d.csv",
        "dataset.path=d.csv: is not UTF-8 text (…)",
        {"d.csv": "text\nä\n".encode("latin-1")},
    ),
    Case("only-empty-texts", "", "dataset.path=d.jsonl: no rows are left…3…", {"d.jsonl": lines(*[{"text": " "}] * 3)}),
    Case(
        "eval-fraction-of-no-row",
        "dataset.eval_fraction=0.0001",
        "dataset.eval_fraction=0.0001: takes 0 of 20 rows; 0 means none wanted",
    ),
    Case(
        "eval-fraction-of-all-that-is-left",
        "dataset.eval_fraction=0.5 dataset.test_fraction=0.49",
        "dataset.eval_fraction=0.5: takes 10 of 20 rows…",
    ),
    Case(
        "eval-file-is-the-training-file",
        "dataset.eval_path=d.jsonl dataset.test_fraction=0",
        "dataset.eval_path=d.jsonl: all 20 rows also stand in training",
    ),
]


def assert_the_result_says(workplace: Workplace, error: str) -> None:
    """The only run folder's `result.json` has the same error."""
    (result,) = workplace.cwd.glob("outputs/runs/default/*/result.json")
    content = json.loads(result.read_text())
    assert (content["status"], content["error"]) == ("failed", error)


@each(DATA)
def test_bad_data_is_one_line_before_torch_loads(case: Case, workplace: Workplace) -> None:
    workplace.write({"d.jsonl": ROWS, **case.files})

    outcome = workplace.call("dataset.path=d.jsonl", *case.arguments.split())

    assert matches(case.says, outcome.error), outcome.error
    assert all(line.startswith("data: ") for line in outcome.stderr.splitlines()[:-1]), outcome.stderr
    assert not outcome.torch_imported
    assert_the_result_says(workplace, outcome.error)


BASE = [
    Case(
        "no-folder",
        "model.name_or_path=./nowhere",
        "model.name_or_path=./nowhere: no such folder; allowed: smollm2_135m, a hub id (owner/name), a folder",
    ),
    Case(
        "no-model-of-that-name",
        "model.name_or_path=smollm2",
        "model.name_or_path=smollm2: no such folder; allowed: smollm2_135m, a hub id…",
    ),
    Case(
        "folder-that-is-no-model",
        "model.name_or_path=base",
        "model.name_or_path=base: is no model folder: it has no config.json",
        {"base/notes.txt": ""},
    ),
    Case("file", "model.name_or_path=d.jsonl", "model.name_or_path=d.jsonl: is no model folder…"),
    Case(
        "adapter",
        "model.name_or_path=base",
        "model.name_or_path=base: is a LoRA adapter, not a base; python -m finetune.merge…",
        {"base/adapter_config.json": "{}", "base/adapter_model.safetensors": ""},
    ),
    Case(
        "only-pickles",
        "model.name_or_path=base",
        "model.name_or_path=base: has no *.safetensors weights (pickled ones are not loaded)",
        {"base/config.json": "{}", "base/pytorch_model.bin": ""},
    ),
]


@each(BASE)
def test_a_bad_base_is_one_line_before_torch_loads(case: Case, workplace: Workplace) -> None:
    workplace.write({"d.jsonl": ROWS, **case.files})

    outcome = workplace.call("dataset.path=d.jsonl", *case.arguments.split())

    assert matches(case.says, outcome.error), outcome.error
    assert outcome.stderr == f"error: {outcome.error}\n"
    assert not outcome.torch_imported
    assert_the_result_says(workplace, outcome.error)


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """The address of a server that accepts connections and never answers (it hangs up after 60 seconds)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(server.accept()[0])

        threading.Thread(target=accept, daemon=True).start()

        def hang_up() -> None:
            for connection in held:
                connection.close()

        patience = threading.Timer(60, hang_up)
        patience.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            patience.cancel()
            hang_up()


HUB = {
    "model.name_or_path": (
        "model.name_or_path=FOLDER takes a model folder from this machine",
        ["dataset.path=d.jsonl"],
    ),
    "dataset.path": ("dataset.path=FILE takes a .jsonl, .csv or .parquet file from this machine", []),
}


@pytest.mark.parametrize("key", list(HUB))
@pytest.mark.parametrize("hub", ["real", "refusing", pytest.param("silent", marks=pytest.mark.slow), "offline"])
def test_a_hub_id_out_of_reach_is_said_within_15_seconds(key: str, hub: str, workplace: Workplace) -> None:
    workplace.write({"d.jsonl": ROWS})
    instead, others = HUB[key]
    # The real hub, where there is one, says that there is no such repository.
    reason = {"real": "the hub …", "offline": f"HF_HUB_OFFLINE is set and nothing of it is cached; {instead}"}.get(
        hub, f"the hub can't be reached (…) and nothing of it is cached; {instead}"
    )
    with silent_server() as silent:
        environment = {
            "refusing": {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "silent": {"HF_ENDPOINT": silent},
            "offline": {"HF_HUB_OFFLINE": "1"},
        }.get(hub, {})
        outcome = workplace.call(f"{key}=nobody-at-all/nothing-of-it", *others, **environment)

    assert matches(f"{key}=nobody-at-all/nothing-of-it: {reason}", outcome.error), outcome.error
    assert outcome.stderr == f"error: {outcome.error}\n"
    assert outcome.seconds < 15
    assert not outcome.torch_imported


TINY = "model.name_or_path=base dataset.path=d.jsonl tracker=none trainer.max_steps=1 sample_max_length=8"


LINEAR = "down_proj, gate_proj, k_proj, …o_proj, q_proj, up_proj, v_proj"


LIBRARIES = [
    Case("trainer-key-in-extra", "trainer.extra.max_steps=3", "trainer.extra.max_steps=3: has a key of its own…"),
    Case("lora-key-in-extra", "lora.extra.r=2", "lora.extra.r=2: has a key of its own"),
    Case("argument-in-a-group", "trainer.extra={frobnicate:1}", "trainer.extra=…frobnicate…"),
    Case(
        "targets",
        "lora.target_modules=[query]",
        f"lora.target_modules=…query…: matches no linear layer; allowed: {LINEAR}",
    ),
    Case("target-pattern", "lora.target_modules=query", f"lora.target_modules=query: …{LINEAR}"),
    Case(
        "length",
        "dataset.max_length=2",
        "dataset.max_length=2: leaves no train row…",
        {"d.jsonl": lines(*({"prompt": f"What is {n}?", "completion": "It."} for n in range(20)))},
    ),
    Case("lora-argument", "+lora.extra.frobnicate=1", "lora.extra…frobnicate…"),
    Case("trainer-argument", "+trainer.extra.frobnicate=1", "trainer.extra…frobnicate…"),
]


LOADING = [
    Case("model-argument", "+model.extra.frobnicate=1", "model.extra…frobnicate…"),
    Case("damaged-weights", "", "model.name_or_path=base: can't be loaded: …"),
]


@pytest.mark.slow
@each(LIBRARIES)
def test_what_the_libraries_refuse_is_one_line_before_the_weights_load(
    case: Case, workplace: Workplace, tiny_base: Path
) -> None:
    workplace.write({"d.jsonl": ROWS, **case.files})
    (workplace.cwd / "base").symlink_to(tiny_base)

    outcome = workplace.call(*TINY.split(), *case.arguments.split())

    assert matches(case.says, outcome.error), outcome.error
    assert WEIGHTS_LOAD not in outcome.stderr
    assert outcome.torch_imported  # the observer sees it where it is
    assert_the_result_says(workplace, outcome.error)


@pytest.mark.slow
@each(LOADING)
def test_what_only_loading_can_tell_is_one_line_too(case: Case, workplace: Workplace, tiny_base: Path) -> None:
    workplace.write({"d.jsonl": ROWS})
    shutil.copytree(tiny_base, workplace.cwd / "base")
    if case.id == "damaged-weights":
        os.truncate(workplace.cwd / "base" / "model.safetensors", 1000)

    outcome = workplace.call(*TINY.split(), *case.arguments.split())

    assert matches(case.says, outcome.error), outcome.error
    assert WEIGHTS_LOAD in outcome.stderr  # else the other tests' absence of it proves nothing
    assert_the_result_says(workplace, outcome.error)


@pytest.mark.slow
def test_4_bit_without_bitsandbytes_says_so_and_what_works_here(workplace: Workplace, tiny_base: Path) -> None:
    workplace.write({"d.jsonl": ROWS})
    (workplace.cwd / "base").symlink_to(tiny_base)

    outcome = workplace.call(*TINY.split(), "quantization=nf4", TEST_WITHOUT_BITSANDBYTES="1")

    expected = "quantization.load_in_4bit=true: …libcudart is broken…; allowed here: quantization=none"
    assert matches(expected, outcome.error), outcome.error
    assert WEIGHTS_LOAD not in outcome.stderr


def can_mount() -> bool:
    """Whether this user may mount a file system of their own."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    return (
        subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not can_mount(), reason="needs a small disk to fill: Linux with user namespaces")
def test_a_full_disk_is_one_line_that_names_the_file(workplace: Workplace, tiny_base: Path) -> None:
    workplace.write({"d.jsonl": ROWS, "run/": b""})
    (workplace.cwd / "base").symlink_to(tiny_base)
    mount = "mount -t tmpfs -o size=400k none run"  # enough to begin, too little for the first checkpoint
    command = [sys.executable, "-m", "finetune", *TINY.split(), "hydra.run.dir=run"]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", *command],
        cwd=workplace.cwd, capture_output=True, text=True,
    )  # fmt: skip

    assert done.returncode == 1
    outcome = Outcome(done.returncode, done.stdout, done.stderr, True, 0)
    assert matches("…No space left on device…run/…", outcome.error), outcome.error
    assert not re.search("Traceback|Logging error|Error executing job", done.stderr), done.stderr


COMMANDS = [
    Case("generate-no-run", "generate nowhere --prompt Hi", "nowhere: is no run folder: it has no run.json"),
    Case("evaluate-no-run", "evaluate nowhere --data d.jsonl", "nowhere: is no run folder: it has no run.json"),
    Case("merge-no-run", "merge nowhere --to new", "nowhere: is no run folder: it has no run.json"),
    Case(
        "generate-no-adapter",
        "generate run --prompt Hi",
        "run: the run has no adapter yet; python -m finetune resume=run goes on with it",
    ),
    Case(
        "merge-no-adapter",
        "merge run --to new",
        "run: the run has no adapter yet; python -m finetune resume=run goes on with it",
    ),
    Case("evaluate-no-data", "evaluate run --data no.jsonl", f"--data=no.jsonl: no such file or folder; {ANY_FILE}"),
    Case("generate-flag", "generate run --prompt Hi --frobnicate", "unrecognized arguments: --frobnicate; see --help"),
    Case(
        "evaluate-flag", "evaluate run --data d.jsonl --frobnicate", "unrecognized arguments: --frobnicate; see --help"
    ),
    Case("merge-flag", "merge run --to new --frobnicate", "unrecognized arguments: --frobnicate; see --help"),
    Case("generate-no-prompt", "generate run", "…required: --prompt; see --help"),
    Case("evaluate-no-data-flag", "evaluate run", "…required: --data; see --help"),
    Case("merge-no-target", "merge run", "…required: --to; see --help"),
    Case("generate-nothing", "generate", "…required: run, --prompt; see --help"),
    Case(
        "generate-length-text",
        "generate run --prompt Hi --max-length long",
        "argument --max-length: …'long'; see --help",
    ),
    Case("generate-length-zero", "generate run --prompt Hi --max-length 0", "…--max-length…0…at least 1…"),
    Case(
        "merge-dtype",
        "merge run --to new --dtype int4",
        "argument --dtype: …'int4'…bfloat16…float16…float32…; see --help",
    ),
    Case("merge-to-a-full-folder", "merge run --to run", "--to=run: exists already; must be a new or an empty folder"),
    Case("merge-to-a-file", "merge run --to d.jsonl", "--to=d.jsonl: exists already; must be a new or an empty folder"),
]


@each(COMMANDS)
def test_a_command_refuses_in_one_line(case: Case, workplace: Workplace) -> None:
    workplace.write({"d.jsonl": ROWS, "run/run.json": json.dumps({"config": compose().to_dict()})})
    before = workplace.files()
    command, *arguments = case.arguments.split()

    outcome = workplace.call(*arguments, module=f"finetune.{command}")

    assert matches(case.says, outcome.error), outcome.error
    assert outcome.stderr == f"error: {outcome.error}\n"
    assert outcome.stdout == ""
    assert workplace.files() == before
    assert not outcome.torch_imported
