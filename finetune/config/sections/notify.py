"""The command that is told how a run or a study ends."""

from dataclasses import dataclass, field

from finetune.config.command_secrets import refuse_secrets_in_command
from finetune.config.sections.section import Section


@dataclass(frozen=True, kw_only=True)
class NotifySettings(Section):
    """A command that runs when a run or a study is completed, failed, interrupted or stalled."""

    section = "notify"

    command: list[str] = field(default_factory=list)
    """The program and its arguments, run without a shell, such as `[./tell.sh]`; []: none. The
    environment variables FINETUNE_EVENT, FINETUNE_NAME, FINETUNE_MESSAGE and FINETUNE_ANSWER say
    what has happened."""

    timeout: float = 60.0
    """Seconds after which the command is ended."""

    stalled_minutes: float | None = 30.0
    """A study is stalled when none of its trials has made a step for so long; null: never."""
    # The defaults are for run folders that were written before the keys existed.

    def __post_init__(self) -> None:
        has_program = not self.command or bool(self.command[0].strip())
        allowed = "must be a program and its arguments, as [./tell.sh], or []"
        self.require("command", has_program, allowed)
        refuse_secrets_in_command(self.command)
        self.require("timeout", self.timeout > 0, "must be above 0 seconds")
        has_limit = self.stalled_minutes is None or self.stalled_minutes > 0
        self.require("stalled_minutes", has_limit, "must be above 0 minutes, or null")
