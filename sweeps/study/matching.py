"""The point of a study's space at which a trial would have the values of another study's trial."""

from collections.abc import Iterable
from typing import Any

from sweeps.space.distributions import contains, describe
from sweeps.space.space import Point, Space
from sweeps.study.result_values import DECIDED, ConfigValues, Values

FIRST_KEYS = (
    "objective",
    "hydra.sweeper.direction",
    "dataset_fingerprint",
    "model.name_or_path",
)
"""Keys whose difference explains those of others: it is named first."""

_UNKNOWN = object()


class Unmatched(Exception):
    """A space has no point with a trial's values. The message says what differs, in few words."""


class Matching:
    """Finds the points of a study's space for values of trials of other studies.

    Args:
        space: the study's space.
        shared: the values that all trials of the study share.
        config: the values of the study's config.
    """

    def __init__(self, space: Space, shared: Values, config: ConfigValues) -> None:
        self._space = space
        self._config = config
        self._sets = config.sets
        self._keys = {name: self._keys_of(name) for name in space.distributions}
        self._searched = set().union(*self._keys.values())
        config_values = {**config.defaults, **shared}
        self._fixed = {
            key: config_values[key] for key in config_values.keys() - self._searched
        }
        self._defaults = {
            key: config_values[key] for key in config_values.keys() & self._searched
        }

    def point(self, values: Values, searched: Iterable[str] = ()) -> Point:
        """Return the point at which a trial of the study has exactly these values.

        Args:
            values: all values of a trial.
            searched: the keys that the trial's study has searched: a difference in one of them is
                described without the trial's value.

        Raises:
            Unmatched: there is none.
        """
        searched = set(searched)
        if self._config.at is None:
            fixed_keys = values.keys() - self._searched
            self._require_equal(values, self._fixed, fixed_keys, searched)
        point: Point = {}
        for name in self._space.distributions:
            if self._space.is_searched(name, point):
                point[name] = self._choice(name, values)
        self._require_equal(values, self._values_at(point), set(values), searched)
        return point

    def partial_point(self, values: Values, searched: set[str]) -> Point:
        """Return the values of the keys that another study has searched, as far as possible."""
        point: Point = {}
        for name in self._space.distributions:
            if not self._keys[name] <= searched:
                continue
            try:
                point[name] = self._choice(name, values)
            # Left to the sampler.
            except Unmatched:
                continue
        unsearched = self._space.unsearched(point)
        return {name: point[name] for name in point if name not in unsearched}

    def _keys_of(self, name: str) -> set[str]:
        if name not in self._sets:
            return {name.lstrip("+")}
        return {key for values in self._sets[name].values() for key in values}

    def _choice(self, name: str, values: Values) -> Any:
        """Return the value of a parameter that means the same as the values of a trial."""
        distribution = self._space.distributions[name]
        key = name.lstrip("+")
        if name not in self._sets:
            value = values.get(key, _UNKNOWN)
            if value is _UNKNOWN:
                raise Unmatched(f"{key} is not known")
            if not contains(distribution, value):
                raise Unmatched(f"{key} outside {describe(distribution)}")
            return value
        for choice, of_choice in self._sets[name].items():
            if all(values.get(key) == of_choice.get(key) for key in self._keys[name]):
                return choice
        raise Unmatched(f"{key}: no choice has its values")

    def _values_at(self, point: Point) -> dict[str, Any]:
        """Return all values of a trial of the study at a point."""
        # What is not searched at this point has the config's own value.
        values = {**self._fixed, **self._defaults}
        if self._config.at is not None:
            composed = self._config.at(point)
            values |= {key: composed[key] for key in composed if key not in DECIDED}
        for name, value in point.items():
            values |= self._sets.get(name, {}).get(value, {name.lstrip("+"): value})
        return values

    @staticmethod
    def _require_equal(
        values: Values, expected: Values, keys: set[str], searched: set[str]
    ) -> None:
        """Raise Unmatched for the first key that differs."""
        compared = sorted(keys | expected.keys())
        for key in [*filter(compared.__contains__, FIRST_KEYS), *compared]:
            value = values.get(key, _UNKNOWN)
            if value == expected.get(key, _UNKNOWN):
                continue
            if key == "dataset_fingerprint":
                raise Unmatched("other rows")
            here = expected.get(key, "none")
            if value is _UNKNOWN:
                raise Unmatched(f"{key} is not known")
            if key in searched:
                raise Unmatched(f"{key} is not {here}")
            raise Unmatched(f"{key}={value} instead of {here}")
