"""Requests for answers wait for those of other runs.

Answers of several runs are generated together in about the time of one run's.
"""

from collections.abc import Sequence

from finetune.engine.steps import Request

TOKENS_OF_A_ROUND = 3
"""A training round takes at least as long as so many generated tokens. On small bases, where
launching kernels takes longest, it launches about so many times the kernels; on large ones it takes
longer, but a slot that waits leaves its time to the others.
"""


def answers_wait(requests: Sequence[Request]) -> bool:
    """Whether the requests for answers wait for a round of the other requests.

    They wait for the next run that will ask for answers, unless the slots that are idle until then
    cost more time than a generation, which is what each further run saves. They wait for no run
    that has no request: it may itself wait for another run. So each round of waiting is a step of
    another run towards its own answers or its end.

    Args:
        requests: Those of the runs that train together on one base, at least one.
    """
    waiting = [request for request in requests if request.rounds_to_answers == 0]
    # Neither 0 nor None: runs that will ask.
    distances = [
        request.rounds_to_answers for request in requests if request.rounds_to_answers
    ]
    if not waiting or not distances:
        return False
    # Only some of the slots are idle meanwhile.
    idle_share = len(waiting) / len(requests)
    cost = min(distances) * idle_share * TOKENS_OF_A_ROUND
    return cost <= requests[0].executor.answer_tokens
