"""What the commands `python -m sweeps COMMAND` do."""
