"""Commands that put a point into a study: add, clone."""

import argparse
from typing import TYPE_CHECKING

from sweeps.study.find_study import find_search

if TYPE_CHECKING:
    from sweeps.space.space import Point
    from sweeps.study.study import Study

# Studies are imported inside the functions: they load Optuna, which `--help` and a mistake on the
# command line do not need.


def add(arguments: argparse.Namespace) -> None:
    """Put a point into a study."""
    from sweeps.study.added_points import read_point

    study = find_search(arguments.study)
    _add(study, read_point(study, "add", arguments.values), arguments)


def clone(arguments: argparse.Namespace) -> None:
    """Put a trial's point into its study once more, with changes."""
    from sweeps.study.added_points import changed_point

    study = find_search(arguments.study)
    point = changed_point(study, arguments.trial, arguments.values)
    _add(study, point, arguments)


def _add(study: "Study", point: "Point", arguments: argparse.Namespace) -> None:
    from sweeps.study.added_points import add_point, describe_added

    number = add_point(study, point)
    if arguments.json:
        content = {"study": study.name, "trial": number, "params": point}
        arguments.print_json(content)
    else:
        print(describe_added(study, number, point))
