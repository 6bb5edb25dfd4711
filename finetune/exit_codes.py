"""The exit codes of all commands; docs/exit-codes.md says when each of them is used."""

ANSWER = 0
MISTAKE = 1
INTERRUPTED = 3
NO_ANSWER = 4
GATE_NOT_MET = 5
