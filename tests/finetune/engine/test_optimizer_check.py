"""Further arguments of optimizer and schedule: each has an effect, or is refused before loading."""

import typing

import pytest
from support.configs import compose
from support.runs import Tiny

from finetune.config.schema import RunConfig
from finetune.config.sections.optimizer import OptimizerName
from finetune.errors import ConfigError
from finetune.run.context import RunContext
from finetune.run.prepare import prepare
from finetune.run.resources import SharedResources

ARGUMENTS = "+trainer.extra.optim_args"
SCHEDULE = "+trainer.extra.lr_scheduler_kwargs"


def prepare_run(config: RunConfig) -> None:
    """Do all that a run does before it loads its base."""
    resources = SharedResources()
    rows = resources.rows(config.dataset)
    prepare(config, rows, RunContext(resources=resources, interactive=False))


REFUSED = {
    "unreadable, plain AdamW": (
        (f"{ARGUMENTS}=nonsense",),
        "trainer.extra.optim_args=nonsense: can't be read (",
    ),
    "no text": (
        ("optimizer.name=sgd", f"{ARGUMENTS}={{momentum:0.9}}"),
        "trainer.extra.optim_args={'momentum': 0.9}: can't be read (",
    ),
    "a typo": (
        ("optimizer.name=sgd", f"{ARGUMENTS}='momentun=0.9'"),
        "trainer.extra.optim_args=momentun=0.9: momentun has no effect on sgd; "
        "allowed: dampening, momentum, nesterov",
    ),
    "one of two": (
        ("optimizer.name=rmsprop", f"{ARGUMENTS}='alpha=0.9, beta1=0.9'"),
        "trainer.extra.optim_args=alpha=0.9, beta1=0.9: beta1 has no effect on rmsprop; "
        "allowed: alpha, centered, eps, momentum",
    ),
    "set by the groups": (
        ("optimizer.name=sgd", f"{ARGUMENTS}='weight_decay=0.1'"),
        "trainer.extra.optim_args=weight_decay=0.1: weight_decay has no effect on sgd; ",
    ),
    "a text for the class": (
        ("optimizer.name=rmsprop_bnb", f"{ARGUMENTS}='momentum=0.9'"),
        "trainer.extra.optim_args=momentum=0.9: momentum has no effect on rmsprop_bnb; "
        "allowed: no entries",
    ),
    "twice": (
        ("optimizer.name=sgd", f"{ARGUMENTS}='momentum=0.9,momentum=0.5'"),
        "trainer.extra.optim_args=momentum=0.9,momentum=0.5: momentum is given more than once",
    ),
    "no truth value": (
        ("optimizer.name=sgd", f"{ARGUMENTS}='momentum=0.9,nesterov=ture'"),
        "trainer.extra.optim_args=momentum=0.9,nesterov=ture: nesterov must be true or false",
    ),
    "a key of the config": (
        ("optimizer.name=sgd", f"{ARGUMENTS}='weight_decay=0.1'"),
        "trainer.extra.optim_args=weight_decay=0.1: weight_decay has no effect on sgd; allowed: "
        "dampening, momentum, nesterov; see optimizer.weight_decay",
    ),
    "no name": (
        ("optimizer.name=sgd", f"{ARGUMENTS}='momentum=0.9,=3'"),
        "trainer.extra.optim_args=momentum=0.9,=3: can't be read; allowed: name=value",
    ),
    "arguments of a constant rate": (
        ("optimizer.lr_scheduler_type=constant_with_warmup", f"{SCHEDULE}={{power:2}}"),
        "trainer.extra.lr_scheduler_kwargs={'power': 2}: "
        "optimizer.lr_scheduler_type=constant_with_warmup has none",
    ),
    "an argument of another schedule": (
        ("optimizer.lr_scheduler_type=linear", f"{SCHEDULE}={{num_cycles:2}}"),
        "trainer.extra.lr_scheduler_kwargs={'num_cycles': 2}: "
        "get_linear_schedule_with_warmup() got an unexpected keyword argument 'num_cycles'",
    ),
    "no number of cycles": (
        ("optimizer.lr_scheduler_type=cosine", f"{SCHEDULE}={{num_cycles:two}}"),
        "trainer.extra.lr_scheduler_kwargs={'num_cycles': 'two'}: ",
    ),
    "what TRL would do with rows": (
        ("trainer.engine=trl", "+trainer.extra.assistant_only_loss=true"),
        "trainer.extra.assistant_only_loss=true: has no effect: ",
    ),
}


@pytest.mark.parametrize("engine", ["packed", "trl"])
@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refuses_in_one_line_before_the_base_is_loaded(
    tiny: Tiny, engine: str, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare_run(tiny(f"trainer.engine={engine}", *overrides))
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", typing.get_args(OptimizerName))
def test_no_optimizer_takes_an_entry_that_it_does_not_have(name: str) -> None:
    from finetune.engine.optimizer_check import check_optimizer

    config = compose(f"optimizer.name={name}", f"{ARGUMENTS}='momentun=0.9'")
    with pytest.raises(ConfigError, match=f"momentun has no effect on {name}; "):
        check_optimizer(config)


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.name=sgd", f"{ARGUMENTS}='momentum=0.9, nesterov=true'"),
        # As the optimizer has it without the entry.
        ("optimizer.name=ademamix", f"{ARGUMENTS}='alpha=5.0,beta3=0.9999'"),
        ("optimizer.name=rmsprop", f"{ARGUMENTS}='centered=False'"),
        ("optimizer.lr_scheduler_type=polynomial", f"{SCHEDULE}={{power:2}}"),
    ],
    ids=str,
)
def test_accepts_what_has_an_effect(tiny: Tiny, overrides: tuple[str, ...]) -> None:
    prepare_run(tiny(*overrides, "optimizer.learning_rate=1e-3"))


@pytest.mark.parametrize("limit", ["-1", "many", "true", "1.5"])
def test_refuses_a_number_of_checkpoints_that_is_none(limit: str) -> None:
    message = "must be a whole number of at least 0"
    with pytest.raises(ConfigError, match=f"save_total_limit={limit}: {message}"):
        compose(f"+trainer.extra.save_total_limit={limit}")
