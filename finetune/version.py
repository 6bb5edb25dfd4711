"""The version of the project."""

__version__ = "0.1.0"

SCHEMA_VERSION = 1
"""Version of `result.json`, `answer.json` and `confirm.json`: docs/schemas. An entry may be added
within a version; one that goes or changes its meaning makes the next."""
