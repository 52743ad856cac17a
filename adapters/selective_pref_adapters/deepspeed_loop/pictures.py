"""The selection of a run's fixed pairs, at each evaluation: how it changes while the policy learns.

In: the held-out pairs and, at each evaluation, what the loss says of the first of them. Out: a picture and its numbers
in the run's folder, an image in TensorBoard and in the tracker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from selective_pref import PreferenceLoss
from selective_pref_adapters.deepspeed_loop.run_log import RunLog
from selective_pref_adapters.deepspeed_loop.sampling import places
from selective_pref_adapters.options import TrainConfig
from selective_pref_adapters.pairs import TokenizedPair
from selective_pref_adapters.seeing.shown import ShownPair, shown_pairs


class Pictures:
    """The fixed pairs of a run: the first `picture_pairs` held-out ones, the same on every process.

    Attributes:
        batches: the pairs, at most `batch_size` at once. Every process passes all of them through the model, since
            sharded weights are gathered by all processes together; only the first process draws.
    """

    def __init__(self, config: TrainConfig, eval_pairs: Sequence[TokenizedPair], tokenizer: Any) -> None:
        fixed = list(eval_pairs[: config.picture_pairs])
        self.batches = [fixed[at : at + config.batch_size] for at in range(0, len(fixed), config.batch_size)]
        self._tokenizer = tokenizer

    def draw(self, read: Sequence[PreferenceLoss], log: RunLog, step: int) -> None:
        """Keeps the pictures of one evaluation.

        Args:
            read: what the loss says of each of the `batches`.
            log: the run's; it writes on the first process only.
            step: optimiser steps taken.
        """
        if log.writes and read:
            log.write_selection(step, list(self._shown(read)))

    def _shown(self, read: Sequence[PreferenceLoss]) -> Iterator[ShownPair]:
        for pairs, out in zip(self.batches, read, strict=True):
            ids = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs if pair.rejected_ids]
            yield from shown_pairs(out, ids, self._tokenizer, places=places(pairs))
