"""Exit codes of the commands."""

ANSWER = 0
MISTAKE = 1
INTERRUPTED = 3
NO_ANSWER = 4
GATE_NOT_MET = 5
