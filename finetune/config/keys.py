"""What a user may have meant by a key that does not exist."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from finetune.config.paths import CONF
from finetune.errors import did_you_mean

SWEEPER = "hydra.sweeper."

OPTUNA = "hydra/sweeper=optuna"

SEARCH_COMMAND = f"python -m finetune -m {OPTUNA}"

_SHORT_FORMS = {
    "n_trials": "hydra.sweeper.n_trials",
    "study": "hydra.sweeper.study_name",
}
"""Keys of a study that are typed often, by their short forms."""

_OTHER_NAMES = {
    "dataset.path": "data dataset_path data_path train_path train_file data_file file",
    "dataset.eval_path": "val_path valid_path validation_path eval_file validation_file",
    "dataset.eval_fraction": "val_fraction validation_fraction val_size eval_size validation_split",
    "dataset.test_fraction": "test_size test_split",
    "dataset.max_length": "max_seq_length max_seq_len seq_length seq_len sequence_length "
    "cutoff_len context_length model_max_length block_size",
    "dataset.limit": "max_samples max_train_samples num_samples samples subset",
    "hydra.run.dir": "output_dir out_dir output outdir run_dir save_dir",
    "hydra.sweeper.n_trials": "trials num_trials n_trial",
    "hydra.sweeper.study_name": "study study_name",
    "hydra/sweeper/pruner": "pruner",
    "hydra/sweeper/sampler": "sampler",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.init_lora_weights": "init_weights init",
    "lora.r": "rank lora_r lora_rank",
    "lora.target_modules": "target targets modules lora_target lora_target_modules",
    "lora.use_dora": "dora",
    "lora.use_rslora": "rslora",
    "model.name_or_path": "base base_model base_model_name model_path model_name "
    "model_name_or_path model_id pretrained_model_name_or_path",
    "name": "run_name experiment_name",
    "objective": "metric metric_for_best_model objective_metric",
    "optimizer.adam_beta1": "beta1",
    "optimizer.adam_beta2": "beta2",
    "optimizer.adam_epsilon": "eps epsilon",
    "optimizer.learning_rate": "lr learning_rate learningrate rate base_lr max_lr",
    "optimizer.lr_scheduler_type": "scheduler lr_scheduler schedule scheduler_type lr_schedule",
    "optimizer.max_grad_norm": "grad_clip gradient_clipping clip max_norm clip_grad_norm",
    "optimizer.name": "optim",
    "optimizer.warmup_ratio": "warmup warmup_steps",
    "optimizer.weight_decay": "wd decay",
    "quantization.load_in_4bit": "4bit use_4bit in_4bit qlora",
    "quantization.load_in_8bit": "8bit use_8bit in_8bit",
    "resume": "resume_from resume_from_checkpoint checkpoint",
    "sample_prompts": "prompt prompts",
    "seed": "random_seed random_state rng_seed",
    "tracker.name": "report_to logger tracking",
    "tracker.project": "wandb_project project_name",
    "trainer.early_stopping_patience": "patience early_stopping",
    "trainer.gradient_accumulation_steps": "grad_accum grad_accum_steps accumulation "
    "accumulate_grad_batches gradient_accumulation accumulation_steps",
    "trainer.max_minutes": "time_limit max_time max_hours max_seconds",
    "trainer.max_steps": "steps num_steps total_steps max_iters iterations",
    "trainer.num_train_epochs": "epochs epoch num_epochs n_epochs max_epochs",
    "trainer.per_device_eval_batch_size": "eval_batch_size val_batch_size",
    "trainer.per_device_train_batch_size": "batch_size train_batch_size micro_batch_size bs "
    "batch per_device_batch_size",
}
"""For keys, the names that other libraries and users give them."""


def expand_short_form(override: str) -> str:
    """Return an override with its whole key, where it has a short form, such as `study=s1`."""
    key, equals, value = override.partition("=")
    return f"{_SHORT_FORMS.get(key, key)}{equals}{value}"


def unknown_key(key: str, siblings: Iterable[str] | None = None) -> str:
    """Return the line for a key that does not exist: the nearest keys and what its group has.

    Args:
        key: the dotted key, or a group, such as `hydra/sweper`.
        siblings: the names that its group has; None: as the config folder's files say.
    """
    if key.replace("/", ".").startswith(SWEEPER):
        return _unknown_sweeper_key(key)
    if "/" in key:
        return f"{key}: no such group; {did_you_mean(key, group_names())}"
    prefix, _, name = key.rpartition(".")
    names = list(_keys_of(prefix) if siblings is None else siblings)
    guesses = _guesses(prefix, name, names)
    allowed = sorted(names or _keys_of(""))
    if not guesses:
        return f"{key}: no such key; {did_you_mean(name, allowed)}"
    guess = " or ".join(guesses)
    return f"{key}: no such key; did you mean {guess}? allowed: {', '.join(allowed)}"


def _guesses(prefix: str, name: str, siblings: list[str]) -> list[str]:
    """Return the likeliest keys; none where the names of the key's own group are likelier."""
    exact = _by_other_name(name, cutoff=1.0)
    if exact is not None:
        return [exact]
    if difflib.get_close_matches(name, siblings, n=1, cutoff=0.7):
        return []
    misspelt = _by_other_name(name, cutoff=0.85)
    if misspelt is not None:
        return [misspelt]
    # `model.path` for `model.name_or_path`.
    with_word = [sibling for sibling in siblings if name in sibling.split("_")]
    if prefix and with_word:
        return [f"{prefix}.{sibling}" for sibling in with_word]
    keys = _all_keys()
    same_name = [key for key in keys if key.rpartition(".")[2] == name]
    if same_name:
        return same_name[:2]
    if difflib.get_close_matches(name, siblings, n=1, cutoff=0.5):
        return []
    # A misspelt group, as in `optimzer.weight_decy`, or a misspelt name without its group.
    whole = difflib.get_close_matches(f"{prefix}.{name}".strip("."), keys, n=1)
    if whole:
        return whole
    last_names = {key.rpartition(".")[2]: key for key in keys}
    nearest = difflib.get_close_matches(name, last_names, n=1, cutoff=0.75)
    return [last_names[nearest[0]]] if nearest else []


def _by_other_name(name: str, cutoff: float) -> str | None:
    """Return the key that has another name elsewhere.

    Args:
        name: the other name.
        cutoff: how alike it must be, as difflib counts; 1.0: the same.
    """
    keys = {}
    for key, names in _OTHER_NAMES.items():
        for other_name in names.split():
            keys[other_name] = key
    word = name.lower().replace("-", "_")
    if word in keys:
        return keys[word]
    # Short words are near to too many others.
    long_names = [other_name for other_name in keys if len(other_name) > 6]
    nearest = difflib.get_close_matches(word, long_names, n=1, cutoff=cutoff)
    return keys[nearest[0]] if nearest else None


def _unknown_sweeper_key(key: str) -> str:
    """Return the line for a key of a sweeper that is not the one of the command line."""
    name = key.replace("/", ".").removeprefix(SWEEPER)
    group, _, last = name.partition(".")
    if last and group in ("sampler", "pruner"):
        return _unknown_key_of_choice(key, group, last)
    names = [*_names(_load(CONF / "hydra/sweeper/optuna.yaml")), "sampler", "pruner"]
    if name in names:
        return f"{key}: needs {OPTUNA}: {SEARCH_COMMAND}"
    return f"{key}: no such key; {did_you_mean(name, names)}"


def _unknown_key_of_choice(key: str, group: str, name: str) -> str:
    """Return the line for a key of a sampler or pruner, by the choices that have such a key."""
    names: set[str] = set()
    for path in sorted((CONF / "hydra/sweeper" / group).glob("*.yaml")):
        of_choice = _names(_load(path))
        if name in of_choice:
            choice = f"hydra/sweeper/{group}={path.stem}"
            return f"{key}: needs {OPTUNA} {choice}: {SEARCH_COMMAND} {choice}"
        names |= set(of_choice)
    shown = f"python -m finetune --cfg hydra -p hydra.sweeper.{group} {OPTUNA}"
    nearest = difflib.get_close_matches(name, sorted(names), n=1)
    guess = f"did you mean {nearest[0]}? " if nearest else ""
    return f"{key}: no such key; {guess}{shown} prints the keys"


def group_names() -> list[str]:
    """Return the groups of the config folder, as they are written on the command line."""
    groups = {"hydra/launcher", "hydra/sweeper", "hydra/sweeper/sampler"}
    for folder in CONF.rglob("*"):
        if folder.is_dir() and any(folder.glob("*.yaml")):
            groups.add(folder.relative_to(CONF).as_posix())
    return sorted(groups)


def _keys_of(group: str) -> list[str]:
    """Return the names of a group's keys; none if there is no such group."""
    node: object = _load(CONF / "config.yaml")
    for name in group.split(".") if group else []:
        node = node.get(name) if isinstance(node, dict) else None
    return _names(node)


def _all_keys() -> list[str]:
    """Return the dotted keys of a run, then those of a study."""
    keys = []
    for name, value in _load(CONF / "config.yaml").items():
        if name in ("defaults", "hydra"):
            continue
        keys.append(name)
        if isinstance(value, dict):
            keys += [f"{name}.{key}" for key in value]
    sweeper = _names(_load(CONF / "hydra/sweeper/optuna.yaml"))
    return keys + [f"{SWEEPER}{name}" for name in sweeper]


def _names(node: object) -> list[str]:
    """Return the names of a group's keys, without Hydra's own."""
    if not isinstance(node, dict):
        return []
    return [str(name) for name in node if name not in ("defaults", "_target_")]


def _load(path: Path) -> dict[str, object]:
    # Late, because only an error needs it.
    from omegaconf import OmegaConf

    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}
