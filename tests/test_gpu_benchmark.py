"""The benchmark of a GPU runs, with a small model on a CPU too."""

import pytest
from support.scripts import run_script
