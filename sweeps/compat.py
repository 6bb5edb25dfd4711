"""Every private name, patch and trick on another library that studies need.

One function each, with the reason, the version it was read in, and the upstream thread if one is
known. `tests/sweeps/test_compat.py` asserts that each name exists and behaves as described. The
libraries are imported inside the functions, so that a module which imports this one stays light.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus

if TYPE_CHECKING:
    import optuna
    from hydra.core.override_parser.types import Override
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage, RDBStorage
    from optuna.trial import FrozenTrial, TrialState
    from sqlalchemy.orm import Session

ENQUEUED_POINT = "fixed_params"
"""The system attribute in which `optuna.Study.enqueue_trial` stores a waiting trial's point."""

CLAIM = "claim"
"""The system attribute of a trial that holds the claim of the worker which trains it."""

RDB_CALLS = (
    "create_new_study",
    "delete_study",
    "set_study_user_attr",
    "set_study_system_attr",
    "get_study_id_from_name",
    "get_study_name_from_id",
    "get_study_directions",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "get_all_studies",
    "get_trial_id_from_study_id_trial_number",
    "get_trial",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "_create_new_trial",
    "_get_best_trial_id",
    "_get_trials",
    "_set_trial_param",
)
"""The methods of `optuna.storages.RDBStorage` that run one transaction each.

Optuna's cache (`optuna/storages/_cached_storage.py`) calls the private ones directly, so a storage
that repeats a call after a lost connection has to wrap them as well. Left out is
`set_trial_state_values`, which is safe to repeat only with further care. Read in Optuna 5.0.0,
`optuna/storages/_rdb/storage.py`; its engine can't be told to repeat a transaction.
"""


def enqueue_point(storage: BaseStorage, trial_id: int, point: dict[str, Any]) -> None:
    """Fix the parameters of a trial that already waits; an empty point leaves them to its sampler.

    `optuna.Study.enqueue_trial` adds a new trial with each point. A study has a fixed number of
    trials, all added when it begins, so its points go to trials that exist. Read in Optuna 5.0.0,
    `optuna/study/study.py`.
    """
    storage.set_trial_system_attr(trial_id, ENQUEUED_POINT, point)


def waiting_trial(point: dict[str, Any], role: str) -> FrozenTrial:
    """Return a trial that waits with a point, to be added to a study in one call.

    `optuna.Study.enqueue_trial` does the same and returns no number. Read in Optuna 5.0.0,
    `optuna/study/study.py`.
    """
    from optuna.trial import TrialState, create_trial

    return create_trial(
        state=TrialState.WAITING,
        user_attrs={"role": role},
        system_attrs={ENQUEUED_POINT: point},
    )


def enqueued_point(trial: FrozenTrial) -> dict[str, Any] | None:
    """Return the point that was enqueued for a trial, or None where its sampler chooses."""
    # Empty: the point was taken from the trial, see `enqueue_point`.
    return trial.system_attrs.get(ENQUEUED_POINT) or None


def filtered_study(
    name: str,
    storage: BaseStorage,
    sampler: BaseSampler,
    pruner: BasePruner,
    accepts: Callable[[FrozenTrial], bool],
) -> optuna.Study:
    """Return a study whose sampler and pruner see only some of its trials.

    Samplers and pruners read all trials by `_get_trials` (or `get_trials`, which calls it), and
    have no setting for which. Optuna's Hyperband overrides the same method for the trials of a
    bracket. Read in Optuna 5.0.0, `optuna/pruners/_hyperband.py` and `optuna/study/study.py`.

    Args:
        name: the study's name in the storage.
        storage: the storage.
        sampler: the sampler of the trials that are made from the study.
        pruner: their pruner.
        accepts: whether they see a trial.
    """
    import optuna

    class FilteredStudy(optuna.Study):
        def _get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
            return list(filter(accepts, super()._get_trials(*args, **kwargs)))

    return FilteredStudy(name, storage, sampler=sampler, pruner=pruner)


def claim_waiting_trial(
    storage: RDBStorage,
    trial_id: int,
    claim: Any,
) -> bool:
    """Set a waiting trial running and store who did, in one transaction.

    `RDBStorage.set_trial_state_values` returns False both for a trial that another worker began
    and for one that this worker began in a transaction whose confirmation was lost. The claim
    tells these apart. Read in Optuna 5.0.0, `optuna/storages/_rdb/storage.py` and `models.py`.

    Args:
        storage: the database.
        trial_id: the storage's id of the trial.
        claim: names the call, as JSON; the same claim again finds the trial claimed by itself.

    Returns:
        Whether the trial runs under this claim.
    """
    from optuna.storages._rdb import models
    from optuna.trial import TrialState

    with _transaction(storage) as session:
        # The row is locked: another worker's claim waits until this transaction ends.
        row: Any = models.TrialModel.find_or_raise_by_id(
            trial_id, session, for_update=True
        )
        # Raises for a finished trial, as Optuna's method does.
        storage.check_trial_is_updatable(trial_id, row.state)
        if row.state != TrialState.WAITING:
            holder = _holders(session, [trial_id]).get(trial_id)
            return bool(holder == claim)
        row.state = TrialState.RUNNING
        row.datetime_start = datetime.now()
        _store_claim(storage, session, trial_id, claim)
    return True


def exchange_claim(
    storage: RDBStorage,
    trial_id: int,
    expected: Any,
    claim: Any,
    silent_seconds: float | None = None,
) -> bool:
    """Replace the claim of a running trial, in one transaction.

    Optuna's `fail_stale_trials` would fail the trial, whose number then could not go on, and
    `RetryHeartbeatStaleTrialCallback` would add another trial. Read in Optuna 5.0.0,
    `optuna/storages/_heartbeat.py` and `_callbacks.py`.

    Args:
        storage: the database.
        trial_id: the storage's id of the trial.
        expected: the claim that the trial must have.
        claim: the claim that it gets.
        silent_seconds: seconds for which the trial must have had no heartbeat; None: any.

    Returns:
        Whether the trial has the new claim.
    """
    from optuna.storages._rdb import models
    from optuna.trial import TrialState

    with _transaction(storage) as session:
        row: Any = models.TrialModel.find_or_raise_by_id(
            trial_id, session, for_update=True
        )
        if row.state != TrialState.RUNNING:
            return False
        holder = _holders(session, [trial_id]).get(trial_id)
        if holder == claim:
            # An attempt before this one was committed, and its confirmation was lost.
            return True
        silence = _silences(session, [trial_id]).get(trial_id, math.inf)
        is_alive = silent_seconds is not None and silence <= silent_seconds
        if holder != expected or is_alive:
            return False
        _store_claim(storage, session, trial_id, claim)
    return True


def record_heartbeats(storage: RDBStorage, claims: Mapping[int, Any]) -> set[int]:
    """Record that the holders of claims are alive, in one transaction.

    `RDBStorage.record_heartbeat` takes one trial and does not ask whose it is.

    Args:
        storage: the database.
        claims: the claims by the storage's ids of their trials.

    Returns:
        The ids of the trials that still have these claims.
    """
    from optuna.storages._rdb import models

    heartbeat = models.TrialHeartbeatModel
    with _transaction(storage) as session:
        holders = _holders(session, list(claims))
        held = {
            trial_id
            for trial_id, claim in claims.items()
            if holders.get(trial_id) == claim
        }
        rows = session.query(heartbeat).filter(heartbeat.trial_id.in_(held))
        values: dict[Any, Any] = {"heartbeat": _server_time(session)}
        rows.update(values, synchronize_session=False)
    return held


def heartbeat_silences(
    storage: RDBStorage, trial_ids: Sequence[int]
) -> dict[int, float]:
    """Return for how many seconds trials have had no heartbeat, by the server's clock."""
    with _transaction(storage) as session:
        return _silences(session, trial_ids)


def _transaction(storage: RDBStorage) -> AbstractContextManager[Session]:
    from optuna.storages._rdb.storage import _create_scoped_session

    return _create_scoped_session(storage.scoped_session)


def _holders(session: Session, trial_ids: Sequence[int]) -> dict[int, Any]:
    """Return the claims of trials, by their ids; a trial without one is left out."""
    from optuna.storages._rdb import models

    model = models.TrialSystemAttributeModel
    rows = session.query(model.trial_id, model.value_json)
    rows = rows.filter(model.trial_id.in_(trial_ids), model.key == CLAIM)
    return {trial_id: json.loads(value) for trial_id, value in rows}


def _store_claim(
    storage: RDBStorage,
    session: Session,
    trial_id: int,
    claim: Any,
) -> None:
    """Store a trial's claim, and its first heartbeat with it."""
    from optuna.storages._rdb import models

    attributes = models.TrialSystemAttributeModel
    storage._set_trial_attr_without_commit(session, attributes, trial_id, CLAIM, claim)
    heartbeat = models.TrialHeartbeatModel.where_trial_id(trial_id, session)
    if heartbeat is None:
        heartbeat = models.TrialHeartbeatModel(trial_id=trial_id)
        session.add(heartbeat)
    heartbeat.heartbeat = _server_time(session)


def _silences(session: Session, trial_ids: Sequence[int]) -> dict[int, float]:
    from optuna.storages._rdb import models

    model = models.TrialHeartbeatModel
    rows = session.query(model.trial_id, model.heartbeat)
    rows = rows.filter(model.trial_id.in_(trial_ids))
    now = _server_time(session)
    return {trial_id: (now - last).total_seconds() for trial_id, last in rows}


def _server_time(session: Session) -> datetime:
    """Return the server's time without a zone: in UTC where it says its zone.

    The column has no zone, and sessions may differ in theirs.
    """
    from sqlalchemy import func

    now: datetime = session.execute(func.now()).scalar_one()
    return now if now.tzinfo is None else now.astimezone(UTC).replace(tzinfo=None)


def changed_trial_ids(
    storage: RDBStorage, study_id: int, first: int, last: int
) -> list[int]:
    """Return the ids of trials that may have changed, without reading the trials themselves.

    A study's waiting trials are its majority for most of its time, and Optuna's cache reads all
    of them anew, with all their values, at each call. Read in Optuna 5.0.0,
    `optuna/storages/_cached_storage.py` and `_rdb/storage.py`.

    Args:
        storage: the database.
        study_id: the storage's id of the study.
        first: the id before which no trial changes any more.
        last: the id up to which the trials are known.

    Returns:
        In order, those from the first one on that do not wait, and all after the last one.
    """
    from optuna.storages._rdb import models
    from optuna.trial import TrialState
    from sqlalchemy import or_

    model = models.TrialModel
    with _transaction(storage) as session:
        rows = session.query(model.trial_id).filter(
            model.study_id == study_id,
            model.trial_id >= first,
            or_(model.state != TrialState.WAITING, model.trial_id > last),
        )
        return [trial_id for (trial_id,) in rows.order_by(model.trial_id)]


def add_waiting_trials(storage: RDBStorage, study_id: int, numbers: range) -> None:
    """Add waiting trials without points, in one transaction; numbers that exist are left out.

    Optuna's storage adds one trial in a transaction and counts all of them each time: ten
    thousand took minutes. Read in Optuna 5.0.0, `optuna/storages/_rdb/storage.py`.

    Args:
        storage: the database.
        study_id: the storage's id of the study.
        numbers: the numbers of the trials, which follow those of the study.
    """
    from optuna.storages._rdb import models
    from optuna.trial import TrialState

    model = models.TrialModel
    with _transaction(storage) as session:
        # The study's row is locked: other machines may add the same trials now.
        models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
        rows = session.query(model.number).filter(
            model.study_id == study_id, model.number >= numbers.start
        )
        present = {number for (number,) in rows}
        session.add_all(
            model(study_id=study_id, number=number, state=TrialState.WAITING)
            for number in numbers
            if number not in present
        )


def study_attribute(storage: RDBStorage, study_id: int, key: str) -> Any | None:
    """Return one of a study's user attributes, where Optuna has a call for all of them only."""
    from optuna.storages._rdb import models

    model = models.StudyUserAttributeModel
    with _transaction(storage) as session:
        rows = session.query(model.value_json).filter_by(study_id=study_id, key=key)
        value = rows.scalar()
    return None if value is None else json.loads(value)


def database_of(storage: BaseStorage) -> RDBStorage | None:
    """Return the database behind Optuna's cache, or None for another storage.

    `optuna.storages.get_storage` wraps a database in a cache, which has no public name for it.
    Read in Optuna 5.0.0, `optuna/storages/_cached_storage.py`.
    """
    from optuna.storages import RDBStorage

    backend = getattr(storage, "_backend", None)
    return backend if isinstance(backend, RDBStorage) else None


def id_of(trial: FrozenTrial) -> int:
    """Return the id under which its storage knows a trial, for which Optuna has no public name."""
    return trial._trial_id


def trial_row(session: Session, study_id: int, number: int) -> Any | None:
    """Return the database's row of a study's trial, or None. Read in Optuna 5.0.0, `models.py`."""
    from optuna.storages._rdb import models

    return (
        session.query(models.TrialModel)
        .filter_by(study_id=study_id, number=number)
        .one_or_none()
    )


def study_with_trials(
    study: optuna.Study,
    select: Callable[[Sequence[FrozenTrial]], list[FrozenTrial]],
) -> optuna.Study:
    """Return a study whose readers see other trials than those of its storage.

    Optuna's samplers read a study's trials by the private `_get_trials`, and it has no public way
    to give them others. Read in Optuna 5.0.0, `optuna/study/study.py`; the filtered study of
    `optuna/pruners/_hyperband.py` has the method too.

    Args:
        study: the study.
        select: returns the trials that are seen, from all trials of the storage.
    """
    import optuna

    class ChangedStudy(optuna.Study):
        def _get_trials(
            self,
            deepcopy: bool = True,
            states: Container[TrialState] | None = None,
            use_cache: bool = False,
        ) -> list[FrozenTrial]:
            selected = select(study._get_trials(deepcopy, None, use_cache))
            return [
                trial for trial in selected if states is None or trial.state in states
            ]

    return ChangedStudy(
        study.study_name,
        study._storage,
        sampler=study.sampler,
        pruner=study.pruner,
    )


def sweep_distribution(override: Override) -> Any:
    """Return the Optuna distribution of a Hydra sweep override; the text of any other override.

    Studies promise the meaning of hydra-optuna-sweeper's search spaces, and it has no public
    function for one override. Read in hydra-optuna-sweeper 1.4.0rc3,
    `hydra_plugins/hydra_optuna_sweeper/_impl.py`.

    Raises:
        ValueError, AssertionError, NotImplementedError: the override is no valid search space.
    """
    from hydra_plugins.hydra_optuna_sweeper._impl import (
        create_optuna_distribution_from_override,
    )

    return create_optuna_distribution_from_override(override)


def job_error(job: JobReturn) -> Any | None:
    """Return the exception that ended a failed job, or None where it completed.

    The public `JobReturn.return_value` prints a line to stderr and raises. Read in Hydra 1.4.0rc3,
    `hydra/core/utils.py`.
    """
    return job._return_value if job.status == JobStatus.FAILED else None


def end_joblib_workers() -> None:
    """End the idle processes of joblib, which would keep their bases in memory for minutes.

    joblib keeps its processes for the next call, has no public name for the executor that is there,
    and `get_reusable_executor` would start one. Read in joblib 1.6.0,
    `joblib/externals/loky/reusable_executor.py`.
    """
    from joblib.externals.loky import reusable_executor

    executor = reusable_executor._executor
    if executor is not None:
        executor.shutdown(wait=True)
