"""Begin or resume the study of a checked session: its data, its base model, its engine."""

import dataclasses
import logging

from finetune.compat import import_model_libraries
from finetune.config.schema import CONSTANT_METRICS, RunConfig
from finetune.console import quiet_libraries
from finetune.engine.selection import choose_engine
from finetune.errors import refusal
from finetune.files.mirror import Mirror
from finetune.model.device import select_gpus, visible_gpus
from finetune.run.resources import shared_resources
from finetune.run.spreading import spread_over
from sweeps.space.samplers import (
    compares_several,
    conditions_note,
    constraints_note,
)
from sweeps.space.settings import StudySettings
from sweeps.study.base_choice import by_base, require_comparable_bases
from sweeps.study.creation import create_or_resume
from sweeps.study.engine_choice import EngineChoice, decide_engine
from sweeps.study.launching import worker_count
from sweeps.study.mirrored import fetch_journal, fetch_study
from sweeps.study.rungs import EVAL_STEPS, with_rungs_of
from sweeps.study.session import Session
from sweeps.study.slot_count import (
    SlotChoice,
    choose_in_one_way,
    choose_slots,
    memory_rank,
)
from sweeps.study.space_check import check_space
from sweeps.study.storage import JOURNAL, check_address
from sweeps.study.study import Study
from sweeps.study.terms import study_terms

log = logging.getLogger(__name__)


def open_study(draft: Session) -> tuple[Study, Session]:
    """Begin or resume a session's study, once everything is checked.

    Args:
        draft: the session, before its engine is chosen.

    Returns:
        The study, and the session with the study's engine.

    Raises:
        ConfigError: the study can't begin, or began on other terms.
    """
    settings = draft.settings
    config = draft.common
    extremes = check_space(draft)
    quiet_libraries(bars=False)
    # Without a baseline, the config's own base is not trained where the base is searched.
    has_baseline = settings.baseline or not extremes
    require_comparable_bases([config, *extremes] if has_baseline else extremes)
    # A missing base model is reported at once, and a remote one downloaded once.
    shared_resources.source(config.model)
    fingerprint = shared_resources.rows(config.dataset).fingerprint
    terms = study_terms(config, draft.space, settings, fingerprint)
    # Again after the draft: `n_jobs=null` is the number of GPUs, which only torch knows.
    workers = worker_count(settings)
    check_address(draft.address, workers)
    gpus = tuple(visible_gpus())
    if workers == 1:
        # It trains in this process, where the plan of its memory uses a GPU already.
        select_gpus(0, settings.gpus_per_worker)
    _log_why_no_pruning(settings, config)
    notes = [
        conditions_note(settings, draft.space.conditions),
        constraints_note(settings),
    ]
    for note in filter(None, notes):
        log.info("%s", note)
    choice = _choose_engine(settings, [config, *extremes])
    distributions = draft.space.distributions
    automatic_keys = [EVAL_STEPS] if draft.has_automatic_rungs else []
    mirror = Mirror(config.mirror)
    fetch_journal(mirror, draft.folder / JOURNAL)
    study = create_or_resume(
        draft.folder,
        settings,
        draft.address,
        terms,
        distributions,
        automatic_keys,
        mirror,
    )
    fetch_study(mirror, study)
    draft = with_rungs_of(study, draft)
    engine = decide_engine(study, choice)
    if settings.slots not in ("auto", engine.slots):
        _log_why_other_slots(settings, engine)
    return study, dataclasses.replace(draft, engine=engine, gpus=gpus)


def _choose_engine(settings: StudySettings, configs: list[RunConfig]) -> EngineChoice:
    """Choose one engine for all trials: TRL if one of the configs needs it.

    Raises:
        ConfigError: A base is to be spread over GPUs that the workers do not have, or can't be.
    """
    gpus = settings.gpus_per_worker
    configs = [spread_over(config, gpus) for config in configs]
    for config in configs:
        if config.trainer.gpus not in ("auto", 1, gpus):
            reason = f"each worker has hydra.sweeper.gpus_per_worker={gpus}"
            raise refusal("trainer.gpus", config.trainer.gpus, reason)
    for config in configs:
        source = shared_resources.source(config.model)
        # The first config that the packed engine does not support logs the reason.
        if choose_engine(config, source) == "trl":
            return EngineChoice("trl", slots=1)
    # The plan would import bitsandbytes by itself, and so torch's compiler too.
    import_model_libraries()
    # Slots that hold the neediest trial hold any other: the study keeps their number.
    neediest = [max(of_base, key=memory_rank) for of_base in by_base(configs).values()]

    def choose(may_borrow: bool) -> list[SlotChoice]:
        return [choose_slots(settings.slots, config, may_borrow) for config in neediest]

    # Those that every base leaves memory for.
    fewest = min(choose_in_one_way(choose), key=lambda choice: choice.count)
    checkpointing = fewest.config.trainer.checkpointing
    return EngineChoice("packed", fewest.count, checkpointing, fewest.borrows_blocks)


def _log_why_other_slots(settings: StudySettings, engine: EngineChoice) -> None:
    if engine.name == "trl":
        reason = "trl trains one trial at a time"
    else:
        reason = "the study keeps those that it began with"
    log.info(
        "hydra.sweeper.slots=%s: %d instead, as %s",
        settings.slots,
        engine.slots,
        reason,
    )


def _log_why_no_pruning(settings: StudySettings, config: RunConfig) -> None:
    if not settings.can_prune:
        return
    if len(settings.directions) > 1 and not compares_several(settings):
        log.info(
            "no pruning: of the pruners only successive_halving compares several objectives"
        )
        return
    for name in config.objectives:
        if not name.startswith("eval/") and name not in CONSTANT_METRICS:
            log.info("no pruning: %s is not known before a trial's end", name)
            return
