"""Sampled decoding in which a row's tokens do not depend on the rows beside it."""

from collections.abc import Sequence

import numpy
import torch
from transformers import LogitsProcessor

from finetune.engine.encoded_prompts import Sampling


class RowSampler(LogitsProcessor):  # type: ignore[misc]
    """Draws each row's next token, with a random number that belongs to the row and the token.

    The most likely token of its scores is the drawn one, so it works in greedy decoding. Rows
    without sampling keep their scores.
    """

    def __init__(
        self,
        rows: Sequence[tuple[Sampling | None, int]],
        tokens: int,
        device: torch.device,
    ) -> None:
        """Draw the random numbers of all tokens.

        Args:
            rows: Of each row: how it is sampled, and the number of its prompt within its run.
            tokens: Limit on the tokens of an answer.
            device: Computes the logits.
        """
        sampled = [sampling is not None for sampling, _ in rows]
        # Greedy rows have any values.
        settings = [sampling or Sampling(1.0) for sampling, _ in rows]
        temperatures = [[sampling.temperature] for sampling in settings]
        shares = [[sampling.top_p] for sampling in settings]
        draws = numpy.empty((len(rows), tokens), dtype=numpy.float32)
        for index, (sampling, number) in enumerate(rows):
            if sampling is not None:
                seeds = [sampling.seed, number]
                draws[index] = numpy.random.default_rng(seeds).random(tokens)
        self._sampled = torch.tensor(sampled, device=device)[:, None]
        self._temperatures = torch.tensor(temperatures, device=device)
        self._shares = torch.tensor(shares, device=device)
        self._draws = torch.from_numpy(draws).to(device)
        self._token = 0

    def select(self, rows: torch.Tensor) -> None:
        """Go on with some rows only.

        Args:
            rows: Their indices.
        """
        self._sampled = self._sampled[rows]
        self._temperatures = self._temperatures[rows]
        self._shares = self._shares[rows]
        self._draws = self._draws[rows]

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor
    ) -> torch.FloatTensor:
        """Return scores of which each row's drawn token is the most likely one."""
        probabilities = torch.softmax(scores / self._temperatures, -1)
        likeliest, tokens = probabilities.sort(-1, descending=True)
        # The share of the tokens before it: that of the first is 0, so it always stays.
        preceding = likeliest.cumsum(-1) - likeliest
        is_drawn = torch.zeros_like(probabilities, dtype=torch.bool)
        is_drawn.scatter_(-1, tokens, preceding < self._shares)
        # In the vocabulary's order: by likelihood, rounding would exchange tokens that are about
        # equally likely, and other rows beside this one change the rounding.
        shares = probabilities.masked_fill(~is_drawn, 0.0).cumsum(-1)
        total = shares[:, -1:]
        draws = self._draws[:, self._token, None] * total
        self._token += 1
        # The first token with the tokens before it above the draw. Rounding may make the draw the
        # total, which none is above: then the last token that has a share.
        passed = (shares <= draws) & (shares < total)
        positions = passed.sum(-1, keepdim=True)
        drawn = torch.full_like(scores, -torch.inf)
        drawn.scatter_(-1, positions, 0.0)
        result: torch.FloatTensor = torch.where(self._sampled, drawn, scores)  # type: ignore[assignment]
        return result
