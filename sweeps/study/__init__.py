"""A study: its storage, its workers and its trials.

In the order of a session: `draft` checks the command, `opening` begins or resumes the study,
`launching` starts workers, `worker` claims trials (`claims`), `trial` runs one, `pack` schedules
the runs of all slots, `pruning` decides at each rung, `outcome` is what a trial ends with.
"""
