"""A bad config ends in one line that names the key, the value and what is allowed, before torch
loads.

Every case is a whole command in a process of its own. Expected lines are written with … for any
text.
"""

import pytest
from support.bad_input import Case, Workplace, each, matches

from finetune.config.keys import _OTHER_NAMES, _all_keys, group_names
from finetune.config.secrets import refuse_secrets, refuse_secrets_in
from finetune.errors import ConfigError

SECRET = "hf_abcdefSECRETghijkl"
CONFIG = [
    Case(
        "choice",
        "model=llama2",
        "model=llama2: …did you mean llama2_7b…allowed: gemma3_12b, …smollm2_135m…",
    ),
    Case(
        "nested-choice",
        "lora/target=qv",
        "lora/target=qv: …did you mean q_v? allowed: all_linear, attention, q_v",
    ),
    Case(
        "experiment",
        "experiment=llama_guanaco",
        "experiment=llama_guanaco: …did you mean llama2_guanaco?…",
    ),
    Case("choice-that-is-a-number", "lora=8", "lora=8: …r8…"),
    Case(
        "objective-twice",
        "objective=[eval/loss,eval/loss]",
        "objective=[…eval/loss…]: must be different metrics",
    ),
    Case(
        "choice-that-is-null",
        "tracker=null",
        "tracker=null: no such choice; allowed: both, mlflow, none, tensorboard, trackio, wandb",
    ),
    Case(
        "key",
        "lora.alhpa=8",
        "lora.alhpa: no such key; did you mean alpha? allowed: adapter, alpha, bias…",
    ),
    Case(
        "added-key",
        "+lora.rank=8",
        "lora.rank: no such key;…allowed: adapter, alpha, …use_rslora",
    ),
    Case(
        "added-group",
        "+optimiser.name=sgd",
        "optimiser: no such key; did you mean optimizer…allowed: dataset, …",
    ),
    Case("top-level-key", "sede=1", "sede: no such key; did you mean seed…"),
    Case("key-below-a-value", "seed.value=1", "seed.value: no such key…"),
    Case("flag", "--frobnicate", "unrecognized arguments: --frobnicate; see --help"),
    Case(
        "config-of-a-sweep", "-m --cfg job", "--cfg: shows a single run; leave out -m"
    ),
    Case("info-of-a-sweep", "-m --info", "--info: shows a single run; leave out -m"),
    Case("word", "frobnicate", "frobnicate: must be KEY=VALUE; see --help"),
    Case(
        "brackets-without-quotes",
        "dataset.path=rows(1).jsonl",
        "dataset.path=rows(1).jsonl: is not Hydra's syntax; text with special characters needs "
        """quotes: 'dataset.path="rows(1).jsonl"'""",
    ),
    Case(
        "quote-within-a-text",
        "dataset.path=row's.jsonl",
        "dataset.path=row's.jsonl: is not Hydra's syntax; text with special characters needs quotes",
    ),
    Case(
        "function-without-arguments",
        "lora.r=choice()",
        "lora.r=choice(): empty choice…",
    ),
    Case(
        "function-of-a-text",
        "lora.r=int(a)",
        "lora.r=int(a): invalid literal for int()…",
    ),
    Case(
        "unknown-function",
        "dataset.path=rows(1)",
        """dataset.path=rows(1): is not Hydra's syntax; …'dataset.path="rows(1)"'""",
    ),
    Case("interpolation", "name=${nope}", "…nope…"),
    Case("config-folder", "--config-dir nowhere", "…nowhere…"),
    Case("text-for-a-whole-number", "lora.r=abc", "lora.r=abc: must be a whole number"),
    Case(
        "fraction-for-a-whole-number",
        "trainer.max_steps=1.5",
        "trainer.max_steps=1.5: must be a whole number",
    ),
    Case(
        "boolean-for-a-whole-number",
        "lora.r=true",
        "lora.r=true: must be a whole number",
    ),
    Case(
        "text-for-a-boolean",
        "lora.use_dora=maybe",
        "lora.use_dora=maybe: must be true or false",
    ),
    Case(
        "number-for-a-boolean",
        "trainer.group_by_length=1",
        "trainer.group_by_length=1: must be true or false",
    ),
    Case("null-for-a-number", "lora.r=null", "lora.r=null: must be a whole number"),
    Case(
        "purpose-of-a-column",
        "dataset.columns={question:text}",
        "dataset.columns.question=text: no such purpose; …allowed: completion, history, …",
    ),
    Case(
        "column-of-two-purposes",
        "dataset.columns.prompt=a dataset.columns.completion=a",
        "dataset.columns.prompt=a: each column can serve one purpose only",
    ),
    Case("value-for-a-group", "lora.extra=5", "lora.extra=5: must be a group of keys"),
    Case(
        "list-with-a-wrong-item",
        "lora.target_modules=[1.5]",
        "lora.target_modules=[1.5]: must be text or a list…",
    ),
    Case("r-zero", "lora.r=0", "lora.r=0: must be a whole number of at least 1"),
    Case("r-negative", "lora.r=-4", "lora.r=-4: must be a whole number of at least 1"),
    Case(
        "no-targets",
        "lora.target_modules=[]",
        "lora.target_modules=[]: must be all-linear or a list…",
    ),
    Case(
        "dropout-one",
        "lora.dropout=1.0",
        "lora.dropout=1.0: must be at least 0 and below 1",
    ),
    Case(
        "dropout-negative",
        "lora.dropout=-0.1",
        "lora.dropout=-0.1: must be at least 0 and below 1",
    ),
    Case(
        "rate-zero",
        "optimizer.learning_rate=0",
        "optimizer.learning_rate=0…: must be above 0",
    ),
    Case(
        "rate-negative",
        "optimizer.learning_rate=-1e-4",
        "optimizer.learning_rate=-0.0001: must be above 0",
    ),
    Case(
        "rate-text",
        "optimizer.learning_rate=fast",
        "optimizer.learning_rate=fast: must be a number or null",
    ),
    Case(
        "rate-nan",
        "optimizer.learning_rate=nan",
        "optimizer.learning_rate=nan: must be a number or null",
    ),
    Case(
        "rate-infinite",
        "optimizer.learning_rate=inf",
        "optimizer.learning_rate=inf: must be a number or null",
    ),
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
    Case(
        "dtype",
        "model.dtype=bf16",
        "model.dtype=bf16: …allowed: auto, bfloat16, float16, float32",
    ),
    Case(
        "limit-word",
        "dataset.limit=all",
        "dataset.limit=all: must be a whole number, null or auto",
    ),
    Case(
        "rungs-word",
        "trainer.eval_steps=aut",
        "trainer.eval_steps=aut: must be a number, a list or auto",
    ),
    Case(
        "gpus",
        "trainer.gpus=two",
        "trainer.gpus=two: did you mean auto? must be a whole number or auto",
    ),
    Case(
        "checkpointing",
        "trainer.gradient_checkpointing=maybe",
        "trainer.gradient_checkpointing=maybe: must be true or false or partial or auto",
    ),
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
    Case(
        "metric",
        "objective=eval/los",
        "objective=eval/los: did you mean eval/loss…allowed: adapter/parameters, …",
    ),
    Case(
        "metric-in-a-list",
        "objective=[eval/loss,eval/f1]",
        "objective=…eval/f1…eval/accuracy…",
    ),
    Case("engine", "trainer.engine=trk", "trainer.engine=trk: …allowed: …trl"),
    Case(
        "tracker",
        "tracker.name=mlfow",
        "tracker.name=mlfow: did you mean mlflow? must be one of wandb, …or a list, …",
    ),
    Case(
        "tracker-in-a-list",
        "tracker.name=[wandb,mlfow]",
        "tracker.name=…mlfow…: must be one of wandb, tensorboard, mlflow, …",
    ),
    Case(
        "tag-too-long",
        f"tracker.tags=[{'x' * 65}]",
        "tracker.tags=x…x: each tag must have 1 to 64 characters…",
    ),
    Case("no-path", "dataset=local", "dataset.path: must be given, as dataset.path=…"),
    Case(
        "fractions-sum-to-one",
        "dataset.eval_fraction=0.5 dataset.test_fraction=0.5",
        "dataset.test_fraction=0.5: with eval_fraction=0.5 leaves no rows to train on",
    ),
    Case(
        "fraction-of-one",
        "dataset.eval_fraction=1",
        "dataset.eval_fraction=1…: must be auto, or at least 0 and below 1…",
    ),
    Case(
        "no-rows-wanted",
        "dataset.limit=0",
        "dataset.limit=0: must be a whole number of at least 1, or null",
    ),
    Case(
        "packing-without-a-length",
        "dataset.packing=true dataset.max_length=null",
        "dataset.packing=true: needs dataset.max_length",
    ),
    Case(
        "steps-zero",
        "trainer.max_steps=0",
        "trainer.max_steps=0: must be at least 1, or -1…",
    ),
    Case(
        "steps-neither-whole-nor-share",
        "trainer.eval_steps=2.5",
        "trainer.eval_steps=2.5: must be a whole number of steps, a share of them from 0.001 to below 1, or 0…",
    ),
    Case(
        "steps-in-a-list",
        "trainer.eval_steps=[0.1,-1]",
        "trainer.eval_steps=[0.1, -1…]: …; or a list of those",
    ),
    Case(
        "a-share-too-small",
        "trainer.save_steps=1e-9",
        "trainer.save_steps=1e-09: …from 0.001 to below 1…",
    ),
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
    Case(
        "resume",
        "resume=nowhere",
        "resume=nowhere: no such run; allowed: the folder of a run that has begun, as …",
    ),
    Case(
        "resume-no-run",
        "resume=.",
        "resume=.: it has no run.json; allowed: the folder of a run…",
    ),
    Case(
        "new-tokens",
        "sample_max_new_tokens=0",
        "sample_max_new_tokens=0: must be a whole number of at least 1, or null",
    ),
    Case(
        "sample-length",
        "sample_max_length=0",
        "sample_max_length=0: must be a whole number of at least 1, or null",
    ),
    Case(
        "no-sample-bound",
        "sample_max_new_tokens=null",
        "sample_max_new_tokens=null: needs sample_max_length",
    ),
    Case(
        "empty-prompt",
        "sample_prompts=['']",
        "sample_prompts=['']: must be texts that are not empty, or null",
    ),
    Case(
        "schedule",
        "optimizer.lr_scheduler_type=cosine_with_min_lr",
        "optimizer.lr_scheduler_type=…trainer.extra.lr_scheduler_kwargs",
    ),
    Case(
        "pissa-on-4-bit",
        "lora.init_lora_weights=pissa",
        "lora.init_lora_weights=pissa: …quantization=none",
    ),
    Case(
        "resume-nothing",
        "resume=",
        "resume=: must be a run folder, a run's name, or latest",
    ),
    Case("resume-added", "++resume=nowhere", "resume=nowhere: no such run; allowed: …"),
]


SWEEPS_WITHOUT_MULTIRUN = {
    "lora=r8,r16": "several values need python -m finetune -m",
    "quantization=nf4,none": "several values need python -m finetune -m",
    "lora.r=8,16": "several values need python -m finetune -m; one list is lora.r=[8,16]",
    "sample_prompts=Hello,World": (
        "several values need python -m finetune -m; one list is sample_prompts=[Hello,World]"
    ),
    "dataset.text_field='a','b'": (
        "several values need python -m finetune -m; one list is dataset.text_field=['a','b']"
    ),
    "lora.r=choice(8,16)": "several values need python -m finetune -m",
    "lora.r=range(1,4)": "several values need python -m finetune -m",
    "seed=shuffle(1,2)": "several values need python -m finetune -m",
    "optimizer.learning_rate=interval(1e-4,1e-3)": (
        "a range needs python -m finetune -m hydra/sweeper=optuna"
    ),
    "optimizer.learning_rate=tag(log,interval(1e-4,1e-3))": (
        "a range needs python -m finetune -m hydra/sweeper=optuna"
    ),
}


GUESSES = {
    "learning_rate": "optimizer.learning_rate",
    "lr": "optimizer.learning_rate",
    "optimizer.lr": "optimizer.learning_rate",
    "model.lr": "optimizer.learning_rate",
    "trainer.learning_rate": "optimizer.learning_rate",
    "optimzer.learning_rate": "optimizer.learning_rate",
    "weight_decy": "optimizer.weight_decay",
    "warmup_steps": "optimizer.warmup_ratio",
    "rank": "lora.r",
    "lora.rank": "lora.r",
    "+lora.rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora.lora_alpha": "lora.alpha",
    "alhpa": "lora.alpha",
    "lra.r": "lora.r",
    "epochs": "trainer.num_train_epochs",
    "trainer.epochs": "trainer.num_train_epochs",
    "batch_size": "trainer.per_device_train_batch_size",
    "batchsize": "trainer.per_device_train_batch_size",
    "max_steps": "trainer.max_steps",
    "max_seq_length": "dataset.max_length",
    "dataset.max_seq_length": "dataset.max_length",
    "data": "dataset.path",
    "base_model": "model.name_or_path",
    "model.path": "model.name_or_path",
    "training.seed": "seed",
    "output_dir": "hydra.run.dir",
    "num_trials": "hydra.sweeper.n_trials",
    "study_name": "hydra.sweeper.study_name",
    "hydra.sweper.n_trials": "hydra.sweeper.n_trials",
}
"""Keys that do not exist, and the key that is meant."""


@pytest.mark.parametrize("key", GUESSES)
def test_a_key_by_another_name_or_without_its_group_is_guessed(
    key: str, workplace: Workplace
) -> None:
    outcome = workplace.call(f"{key}=3")

    expected = (
        f"{key.lstrip('+')}: no such key; did you mean {GUESSES[key]}? allowed: …"
    )
    assert matches(expected, outcome.error), outcome.error
    assert not outcome.torch_imported
    assert workplace.files() == set()


def test_every_guessed_key_exists() -> None:
    groups = set(group_names())
    for key in _OTHER_NAMES:
        assert key in groups or key in {*_all_keys(), "hydra.run.dir"}, key


SEARCH = "python -m finetune -m hydra/sweeper=optuna"
ONLY_IN_SWEEPS = {
    "hydra/sweeper=optuna": f"hydra/sweeper=optuna: has no effect without -m: {SEARCH}",
    "hydra/sweeper=optuna lora=r8 hydra.sweeper.study_name=s": (
        f"hydra/sweeper=optuna: has no effect without -m: {SEARCH} "
        "hydra.sweeper.study_name=s lora=r8"
    ),
    "hydra/sweeper=optuna lora.r=abc": (
        f"hydra/sweeper=optuna: has no effect without -m: {SEARCH} lora.r=abc"
    ),
    "hydra/launcher=basic": (
        "hydra/launcher=basic: has no effect without -m: python -m finetune -m "
        "hydra/launcher=basic"
    ),
    "hydra.launcher.slots=2": (
        "hydra.launcher.slots=2: has no effect without -m: python -m finetune -m "
        "hydra.launcher.slots=2"
    ),
    "+hydra.sweeper.n_trials=3": "+hydra.sweeper.n_trials=3: has no effect without -m: …",
    "hydra.sweeper.study_name=s": (
        f"hydra.sweeper.study_name: needs hydra/sweeper=optuna: {SEARCH}"
    ),
    "study=s": f"hydra.sweeper.study_name: needs hydra/sweeper=optuna: {SEARCH}",
    "-m n_trials=3": f"hydra.sweeper.n_trials: needs hydra/sweeper=optuna: {SEARCH}",
    "hydra/sweeper=optuna study=s n_trials=3": (
        f"hydra/sweeper=optuna: has no effect without -m: {SEARCH} "
        "hydra.sweeper.study_name=s hydra.sweeper.n_trials=3"
    ),
    "-m hydra.sweeper.n_trials=3": (
        f"hydra.sweeper.n_trials: needs hydra/sweeper=optuna: {SEARCH}"
    ),
    "-m +hydra.sweeper.n_trials=3": (
        f"hydra.sweeper.n_trials: needs hydra/sweeper=optuna: {SEARCH}"
    ),
    "-m hydra/sweeper/sampler=random": (
        f"hydra/sweeper/sampler: needs hydra/sweeper=optuna: {SEARCH}"
    ),
    "-m hydra.sweeper.pruner.min_survivors=1": (
        "hydra.sweeper.pruner.min_survivors: needs hydra/sweeper=optuna "
        f"hydra/sweeper/pruner=successive_halving: {SEARCH} "
        "hydra/sweeper/pruner=successive_halving"
    ),
    "-m hydra/sweeper=optuna hydra.sweeper._target_=hydra_plugins.hydra_optuna_sweeper."
    "optuna_sweeper.OptunaSweeper": (
        "hydra.sweeper._target_: OptunaSweeper of hydra-optuna-sweeper…leave _target_ out…"
    ),
    "hydra/sweper=optuna": "hydra/sweper: no such group; did you mean hydra/sweeper …",
}
"""Arguments of a search without -m or without its sweeper."""


@pytest.mark.parametrize("arguments", ONLY_IN_SWEEPS)
def test_a_search_without_m_or_without_its_sweeper_is_refused_with_the_command(
    arguments: str, workplace: Workplace
) -> None:
    outcome = workplace.call(*arguments.split())

    assert matches(ONLY_IN_SWEEPS[arguments], outcome.error), outcome.error
    assert outcome.stderr == f"error: {outcome.error}\n"
    assert not outcome.torch_imported
    assert workplace.files() == set()


WORDS = {
    "train": "train: must be KEY=VALUE; did you mean python -m finetune?",
    "run lora=r8": "run: must be KEY=VALUE; did you mean python -m finetune?",
    "-m train": "train: must be KEY=VALUE; did you mean python -m finetune?",
    "hlep": "hlep: must be KEY=VALUE; did you mean python -m finetune --help?",
    "versoin": "…did you mean python -m finetune --version?",
    "generate RUN --prompt x": "…did you mean python -m finetune.generate?",
    "evalute RUN": "…did you mean python -m finetune.evaluate?",
    "multirun lora=r8,r16": "…did you mean python -m finetune -m?",
    "sweeps": "…did you mean python -m sweeps --help?",
    "model llama2_7b": "model: must be GROUP=CHOICE; allowed: gemma3_12b, gemma3_1b, …",
    "rows.jsonl": "…did you mean dataset.path=rows.jsonl?",
    "--hlep": "unrecognized arguments: --hlep; did you mean --help? see --help",
    "--multirn": "…did you mean --multirun? see --help",
    "model=owner/name": (
        "model=owner/name: no such choice; did you mean model.name_or_path=owner/name?"
    ),
    "dataset=./rows.jsonl": "…did you mean dataset.path=./rows.jsonl?",
}
"""What is typed instead of an override, and the answer."""


@pytest.mark.parametrize("arguments", WORDS)
def test_another_word_than_an_override_is_answered_with_what_to_type(
    arguments: str, workplace: Workplace
) -> None:
    workplace.write({"rows.jsonl": ""})

    outcome = workplace.call(*arguments.split())

    assert matches(WORDS[arguments], outcome.error), outcome.error
    assert outcome.stderr == f"error: {outcome.error}\n"
    assert not outcome.torch_imported
    assert workplace.files() == {"rows.jsonl"}


@pytest.mark.parametrize("override", SWEEPS_WITHOUT_MULTIRUN)
def test_several_values_without_m_are_one_line_that_says_to_add_it(
    override: str, workplace: Workplace
) -> None:
    outcome = workplace.call(override)

    assert outcome.stderr == f"error: {override}: {SWEEPS_WITHOUT_MULTIRUN[override]}\n"
    assert not outcome.torch_imported
    assert workplace.files() == set()


@each(CONFIG)
def test_a_bad_config_is_one_line_and_leaves_nothing(
    case: Case, workplace: Workplace
) -> None:
    outcome = workplace.call(*case.arguments.split())

    assert matches(case.says, outcome.error), outcome.error
    assert outcome.stderr == f"error: {outcome.error}\n"
    assert outcome.stdout == ""
    assert not outcome.torch_imported
    assert workplace.files() == set()


def test_a_multiruns_failed_job_is_said_and_ends_in_one_line(
    workplace: Workplace,
) -> None:
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
    "command": f"notify.command=[curl,--token,{SECRET}]",
    "command-unreadable": f"notify.command=[curl,token={SECRET}",
    "folder-in-use": f"hydra.run.dir=run +model.extra={{token:{SECRET}}}",
}


@pytest.mark.parametrize("arguments", SECRETS.values(), ids=SECRETS)
def test_a_secret_on_the_command_line_reaches_no_file_and_no_output(
    arguments: str, workplace: Workplace
) -> None:
    workplace.write({"run/notes.txt": "older than the command"})

    outcome = workplace.call(*arguments.split(), "dataset.path=missing.jsonl")

    holders = [
        path
        for path in workplace.cwd.rglob("*")
        if path.is_file() and SECRET in path.read_text()
    ]
    assert holders == []
    assert SECRET not in outcome.stdout + outcome.stderr
    assert matches(
        "…: a credential in a config would be written to files; …",
        outcome.error,
    )
    assert not outcome.torch_imported


@pytest.mark.parametrize(
    "token",
    [
        "hf_" + "aB3" * 12,
        "sk-proj-" + "aB3_" * 10,
        "wandb_v1_" + "aB3" * 10,
        "ghp_" + "aB3" * 12,
    ],
)
def test_a_token_is_refused_as_any_keys_value(token: str) -> None:
    """Its key alone would not tell."""
    prefix = r"tracker\.project: a credential in a config"
    with pytest.raises(ConfigError, match=prefix) as refused:
        refuse_secrets_in(f"tracker.project=[a,{token}]")
    assert token not in str(refused.value)
    with pytest.raises(ConfigError, match=prefix):
        refuse_secrets({"tracker": {"project": ["a", token]}})


@pytest.mark.parametrize(
    "value",
    [
        "3f5c1e" * 6 + "abcd",
        "task-of-the-1st-kind-of-all-the-kinds",
        "hf_model",
        "./sk-1",
    ],
)
def test_what_only_resembles_a_token_is_taken(value: str) -> None:
    refuse_secrets_in(f"model.revision={value}")


@pytest.mark.parametrize("folder", ["/proc/nope/x", "file/x"])
def test_a_folder_that_cannot_be_made_is_named_with_its_key(
    folder: str, workplace: Workplace
) -> None:
    workplace.write({"file": "regular"})

    outcome = workplace.call(f"hydra.run.dir={folder}")

    assert matches(f"hydra.run.dir={folder}: …", outcome.error), outcome.error
    assert outcome.stderr == f"error: {outcome.error}\n"
    assert not outcome.torch_imported
    assert workplace.files() == {"file"}
