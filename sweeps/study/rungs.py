"""The rungs of a study where `trainer.eval_steps=auto` leaves them to it."""

import dataclasses

from omegaconf import DictConfig

from finetune.config.plain_values import (
    RUN_EVAL_STEPS,
    STUDY_EVAL_STEPS,
    resolve_study_eval_steps,
)
from sweeps.space.space import Space
from sweeps.study.session import Session
from sweeps.study.study import Study

EVAL_STEPS = "trainer.eval_steps"


def choose_rungs(composed: DictConfig, space: Space) -> bool:
    """Replace `trainer.eval_steps=auto` in a study's composed config.

    Args:
        composed: the config with the baseline's values; it is changed.
        space: the searched parameters. Where the rungs are among them, the baseline has those of a
            run of its own.

    Returns:
        Whether the value was `auto`.
    """
    are_searched = EVAL_STEPS in space.distributions
    eval_steps = RUN_EVAL_STEPS if are_searched else STUDY_EVAL_STEPS
    return resolve_study_eval_steps(composed, eval_steps)


def with_rungs_of(study: Study, session: Session) -> Session:
    """Return a session with the rungs that its study began with, if the config leaves them to it.

    Args:
        study: the study, begun or resumed; its terms hold its rungs, unless they are searched.
        session: the session.
    """
    common = session.common
    terms = study.optuna.user_attrs["terms"]
    if not session.has_automatic_rungs or EVAL_STEPS not in terms:
        return session
    trainer = dataclasses.replace(common.trainer, eval_steps=terms[EVAL_STEPS])
    common = dataclasses.replace(common, trainer=trainer)
    return dataclasses.replace(session, common=common)
