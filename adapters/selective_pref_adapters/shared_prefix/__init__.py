"""The prompt of a pair goes through the model's body once, and no padding goes through it at all.

Between `batch` and `heads`. In: the padded rows that every collator gives, `[2B T+1]`, and a causal LM. Out: the hidden
states from which the completion tokens are predicted, `[M D]`, and the positions of these tokens in `[2B T]`. The last
token of a prompt predicts the first token of every response to it.

Two layouts compute the same numbers as the padded rows:

* `packed`: rows `[prompt | chosen | rejected]`, in which positions restart after the prompt, under a mask by which a
  response sees the prompt and itself. Short groups share a row.
* `continued`: the prompt's keys and values, computed once, are continued by each response. The shapes of a row's
  computation depend on that row alone, so its bits do, too: the other side of the pair cannot move them.

`exact` finds out which of them give a model's own numbers, by running the model; `layout` chooses for a batch.
"""

from selective_pref_adapters.shared_prefix.layout import Layout, continues, lay_out, prepare

__all__ = ["Layout", "continues", "lay_out", "prepare"]
