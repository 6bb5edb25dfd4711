"""Promote a study's winner: through the gate, then into a registry with its lineage."""

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.config.schema import RunConfig
from finetune.errors import refusal
from finetune.files.atomic import read_json
from finetune.files.lock import file_lock
from finetune.files.run_folder import RunFolder
from finetune.metrics.names import describe_metric
from finetune.model.adapter_files import weights_digest
from finetune.run.load import read_trained_config
from finetune.sharing.card_data import data_lines
from finetune.sharing.hub_registry import HubRegistry
from finetune.sharing.model_card import environment
from finetune.sharing.public_values import file_name, is_hub_id, public_parameter
from finetune.sharing.publication import Target
from finetune.sharing.upload import require_uploads
from finetune.tracking.mlflow_registry import MlflowRegistry
from finetune.tracking.open import require_package
from finetune.tracking.registry import DIGEST, Lineage, Registry, Version, require_alias
from finetune.tracking.text_privacy import tracked_config
from finetune.tracking.wandb_registry import WandbRegistry
from sweeps.answer.gate import (
    Deployed,
    Gate,
    Verdict,
    find_deployed,
    find_metric,
    pass_gate,
    read_rows,
    require_same_base,
)
from sweeps.answer.publish_hub import best_folder, study_extra
from sweeps.study.study import ANSWER, Study

log = logging.getLogger(__name__)

NONE = "none"
"""Stands for the deployed adapter where none is deployed yet."""

DEFAULT_NAME = "finetune"
"""The name in a registry for want of others, as the default project of trackers."""


@dataclass(frozen=True)
class Request:
    """What a promotion is asked for, as the command names it."""

    against: str
    gate: Gate
    to: str
    """wandb, mlflow or hub."""
    alias: str
    name: str | None
    """The registered model, artifact or repository; None: the default."""


@dataclass(frozen=True)
class Promotion:
    """How a promotion has ended."""

    study: str
    trial: int
    request: Request
    verdict: Verdict | None
    """None: there was nothing to compare with, or nothing to compare."""
    version: Version | None
    """The registered version; None: the gate was not met."""
    is_new: bool
    """Whether this command has given it the alias."""
    reason: str
    """What has happened, in one line."""

    @property
    def is_refused(self) -> bool:
        """Whether the gate was not met."""
        return self.version is None

    def to_dict(self) -> dict[str, Any]:
        """Return the promotion as `--json` prints it."""
        request, verdict, version = self.request, self.verdict, self.version
        registered = None
        if version is not None:
            registered = {
                "to": request.to,
                "name": version.name,
                "version": version.version,
                "alias": request.alias,
                "url": version.url,
                "command": version.command,
                "new": self.is_new,
            }
        return {
            "study": self.study,
            "trial": self.trial,
            "against": None if request.against == NONE else request.against,
            "data": request.gate.data,
            "metric": request.gate.metric,
            "min_gain": request.gate.min_gain,
            "rows": verdict.rows if verdict else None,
            "winner": verdict.winner if verdict else None,
            "deployed": verdict.deployed if verdict else None,
            "gain": verdict.gain if verdict else None,
            "interval_95": list(verdict.interval) if verdict else None,
            "promoted": not self.is_refused,
            "registered": registered,
            "reason": self.reason,
        }


def check_request(request: Request) -> None:
    """Refuse what no study could make right, before a study is opened.

    Raises:
        ConfigError: The alias, the gain, or a package that is missing.
    """
    require_alias(request.alias)
    # A variable of a script that was not set must not stand for the default.
    if request.name is not None and not request.name.strip():
        raise refusal("--name", request.name, "must be a name, or left out")
    if not math.isfinite(request.gate.min_gain):
        raise refusal("--min-gain", request.gate.min_gain, "must be a number")
    require_package("--to", request.to)


def promote(study: Study, request: Request) -> Promotion:
    """Compare a study's winner with the deployed adapter, and register it if it is better.

    Args:
        study: A study with an answer.
        request: What is asked for.

    Raises:
        ConfigError: The adapters or rows can't be compared, the registry can't be reached, or the
            alias has moved during the comparison.
    """
    # Two promotions at once would register the same adapter twice.
    lock = study.folder / ".promote.lock"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(lock, wait=False))
        except BlockingIOError:
            log.info("waiting for another promotion of %s to end", study.name)
            stack.enter_context(file_lock(lock))
        return _promote(study, request)


def _promote(study: Study, request: Request) -> Promotion:
    folder = best_folder(study)
    config = read_trained_config(folder)
    trial = int(read_json(study.folder / ANSWER)["trial"])
    digest = weights_digest(RunFolder(folder).adapter)
    # In the first week too, when nothing is compared, so that no mistake waits for the second.
    metrics = find_metric(request.gate, config, folder)
    rows = read_rows(request.gate, config)
    deployed = None
    if request.against != NONE:
        deployed = find_deployed(request.against)
        require_same_base(folder, deployed)
    # Before the evaluation, which may take long: it may be in vain.
    registry = _registry(study, request, config)
    current = registry.current(request.alias)

    def ended(
        reason: str,
        verdict: Verdict | None = None,
        version: Version | None = None,
        is_new: bool = False,
    ) -> Promotion:
        return Promotion(study.name, trial, request, verdict, version, is_new, reason)

    if current is not None and current.digest == digest:
        reason = f"{request.alias} is this adapter already: {_shown(current)}"
        return ended(reason, version=current)
    if deployed is None and current is not None:
        reason = (
            f"{request.alias} is an adapter already ({_shown(current)}); give the folder of the "
            "deployed adapter, so that the two are compared"
        )
        raise refusal("--against", NONE, reason)
    if deployed is not None and deployed.digest == digest:
        return ended(f"{request.against} is the winner itself, so there is no gain")
    verdict = None
    if deployed is not None:
        _warn_of_another(request, deployed, current)
        gate = request.gate
        verdict = pass_gate(gate, folder, config, rows, metrics, deployed)
        if not verdict.is_met:
            return ended(gate_line(request.gate, verdict), verdict)
        _require_same(request, current, registry.current(request.alias))
    lineage = _lineage(study, request, config, digest, deployed, verdict)
    adapter = RunFolder(folder).adapter
    version = registry.register(adapter, lineage, request.alias)
    reason = f"registered in {registry.title}: {_shown(version)} is {request.alias}"
    return ended(reason, verdict, version, is_new=True)


def _warn_of_another(
    request: Request, deployed: Deployed, current: Version | None
) -> None:
    """Say that the alias marks another adapter than the one that is compared."""
    if current is None or current.digest in (None, deployed.digest):
        return
    log.warning(
        "%s marks another adapter (%s); the winner is compared with --against=%s",
        request.alias,
        _shown(current),
        request.against,
    )


def _require_same(
    request: Request, before: Version | None, now: Version | None
) -> None:
    """Refuse an alias that another promotion has moved during the comparison."""
    if now is None or (before is not None and _are_same(before, now)):
        return
    reason = (
        f"marks another adapter since the comparison began ({_shown(now)}); compare the winner "
        "with that one"
    )
    raise refusal("--alias", request.alias, reason)


def _are_same(before: Version, now: Version) -> bool:
    """Whether two versions are one adapter. On the hub another text is another version."""
    if before.digest is not None and now.digest is not None:
        return before.digest == now.digest
    return before.version == now.version


def gate_line(gate: Gate, verdict: Verdict) -> str:
    """Say by which number a gate decides."""
    low, high = verdict.interval
    name = describe_metric(gate.metric)
    return (
        f"gain in {name} {verdict.gain:+.4f}, 95 % interval {low:+.4f} to {high:+.4f} on "
        f"{verdict.rows} rows: the lower end must be above {gate.min_gain:g}"
    )


def _shown(version: Version) -> str:
    return f"{version.name}, version {version.version}"


def _registry(study: Study, request: Request, config: RunConfig) -> Registry:
    """Open the registry that a promotion names.

    Raises:
        ConfigError: It is not in reach, or needs a name.
    """
    settings = config.tracker
    if request.to == "hub":
        name = request.name or config.hub.model_id
        if name is None:
            raise refusal("--name", None, "give the repository, as OWNER/NAME")
        key = "--name" if request.name else "hub.model_id"
        require_uploads(key, name)
        target = Target(key, name, config.hub.private, config.hub.samples)
        return HubRegistry(
            target, lambda lineage: study_extra(study, [_section(request, lineage)])
        )
    name = request.name or settings.project or DEFAULT_NAME
    key = "--name" if request.name else "tracker.project"
    if request.to == "mlflow":
        return MlflowRegistry(key, name, settings.project)
    return WandbRegistry(key, name, settings.project, settings.entity, settings.text)


def _lineage(
    study: Study,
    request: Request,
    config: RunConfig,
    digest: str,
    deployed: Deployed | None,
    verdict: Verdict | None,
) -> Lineage:
    """Return where the winner comes from, and why it is promoted. No paths of this machine."""
    answer = read_json(study.folder / ANSWER)
    result = read_json(RunFolder(best_folder(study)).result) or {}
    gate = request.gate
    lineage: dict[str, Any] = {
        "study": study.name,
        "trial": answer["trial"],
        "params": _public_params(answer["params"]),
        "objective": answer["objective"],
        DIGEST: digest,
        "base_model": _public_base(result.get("base_model")),
        "dataset": data_lines(config),
        "dataset_fingerprint": result.get("dataset_fingerprint"),
        "against": None,
        "versions": result.get("versions"),
        "git_commit": result.get("git_commit"),
        "config": tracked_config(config),
    }
    if deployed is not None and verdict is not None:
        lineage["against"] = {"name": deployed.name, DIGEST: deployed.digest}
        lineage["gate"] = {
            "data": gate.data if is_hub_id(gate.data) else file_name(gate.data),
            "data_fingerprint": verdict.data_fingerprint,
            "metric": gate.metric,
            "min_gain": gate.min_gain,
            **dataclasses.asdict(verdict),
        }
        del lineage["gate"]["is_met"]
    return lineage


def _public_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the winner's values: numbers as they are, of all else what may be published."""
    shown = {}
    for name, value in params.items():
        is_plain = value is None or isinstance(value, bool | int | float)
        shown[name] = value if is_plain else public_parameter(name, value)
    return shown


def _public_base(base: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the base's name without its path, its commit, and the hash of its weights."""
    if base is None:
        return None
    return {
        **base,
        "name": base["name"] if base["revision"] else os.path.basename(base["name"]),
    }


def _section(request: Request, lineage: Lineage) -> str:
    """Return a card's section on a promotion."""
    template = environment("sweeps.answer").get_template("promotion_card.md.jinja")
    text: str = template.render(
        alias=request.alias,
        gate=lineage.get("gate"),
        against=lineage["against"],
        digest=DIGEST,
    )
    return text.strip()
