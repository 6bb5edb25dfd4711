"""What the jobs of a multirun differ in."""

import pytest

from sweeps.study.multirun_folder import describe_values, differing_values


@pytest.mark.parametrize(
    ("jobs", "descriptions"),
    [
        ([["lora=r4", "seed=1"], ["lora=r8", "seed=1"]], ["lora=r4", "lora=r8"]),
        ([["lora=r4"]], [""]),
        (
            [["a=1", "b=2"], ["a=1", "b=3"], ["a=2", "b=2"]],
            ["a=1 b=2", "a=1 b=3", "a=2 b=2"],
        ),
        (
            [["+lora.extra.x=1"], ["+lora.extra.x=2"]],
            ["lora.extra.x=1", "lora.extra.x=2"],
        ),
        ([["a=1", "b=2"], ["a=1"]], ["b=2", ""]),
        ([["a=1"], ["a=1", "b=2"]], ["", "b=2"]),
        ([["path=x=1"], ["path=x=2"]], ["path=x=1", "path=x=2"]),
    ],
)
def test_jobs_are_described_by_what_differs(
    jobs: list[list[str]], descriptions: list[str]
) -> None:
    values = differing_values(jobs)
    assert [describe_values(job) for job in values] == descriptions
