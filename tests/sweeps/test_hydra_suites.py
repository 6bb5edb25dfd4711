"""Hydra's own tests of its launchers pass with this package installed."""

import pytest
from hydra.core.plugins import Plugins
from hydra.test_utils.launcher_common_tests import LauncherTestSuite

# Before the tests, as the suites want it: it imports all plugins.
Plugins.instance()

pytestmark = [
    pytest.mark.slow,
    # The suites' and the launchers' own.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize(
    ("launcher_name", "overrides"),
    [("basic", []), ("joblib", []), ("submitit_local", [])],
)
class TestLaunchers(LauncherTestSuite):
    """Each test with each launcher."""
