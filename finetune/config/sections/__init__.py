"""The sections of a run's config, one module for each group of `conf/`.

They are frozen, typed dataclasses that check their own values. Defaults are in `conf/`.
`docs/configuration.md` is generated from the docstrings of the fields.
"""
