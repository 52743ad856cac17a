"""Logits → per-token log-probs: the dense side flow into the first arrow.

In: logits [B T+1 V] of a causal model and the token ids they were computed from. Out: log-probs [B T] of each next
token, shifted once, here and nowhere else, with the mask of those that count. `selective_pref.fused` gives the same
numbers without the logits.
"""

from __future__ import annotations

from selective_pref import _arrays
from selective_pref._arrays import Array


def per_token_logps(logits: Array, labels: Array, *, ignore_index: int = -100) -> tuple[Array, Array]:
    """log softmax(logits)[label] of every next token, and which of them count.

    Entry t of the result is the log-prob of ``labels[:, t + 1]`` under ``logits[:, t]``: the shift is done here, so
    pass logits and labels as they come, of one length. Statistics are float32 or wider whatever the logits are: a
    log-softmax in bf16 moves a quarter of the selected tokens.

    Args:
        logits: real floating [B T+1 V].
        labels: integer [B T+1], in [0, V), or `ignore_index` for prompt and padding (their logits are not read:
            NaN there changes neither value nor gradient). The log-prob of any other id is NaN: values are not looked
            at, which would wait for a device.

    Returns:
        per_token_logps [B T], at least float32, 0 off the mask; mask bool [B T].

    Raises:
        TypeError: logits not floating, labels not integer, mixed libraries.
        ValueError: shapes that do not fit, fewer than one position, devices that differ.
    """
    _arrays.check_floating("logits", logits)
    _arrays.check_array("labels", labels)
    _arrays.check_same_home("logits", logits, "labels", labels)
    xp = _arrays.namespace(logits)
    if not xp.isdtype(labels.dtype, "integral"):
        raise TypeError(f"labels must be integer token ids; got {_arrays.describe(labels)}")
    if logits.ndim != 3 or tuple(labels.shape) != tuple(logits.shape[:2]) or labels.shape[1] < 1:
        raise ValueError(
            "logits must be [B T+1 V] and labels [B T+1], both unshifted; got "
            f"{_arrays.describe(logits)} and {_arrays.describe(labels)}"
        )
    logits, labels = logits[:, :-1, :], labels[:, 1:]
    mask = labels != ignore_index
    here = xp.expand_dims(mask, axis=-1)
    wide = xp.where(here, _arrays.upcast(logits), xp.zeros((), dtype=xp.float32, device=_arrays.compat.device(logits)))
    peak = _arrays.detach(xp.max(wide, axis=-1, keepdims=True))
    log_normaliser = peak + xp.log(xp.sum(xp.exp(wide - peak), axis=-1, keepdims=True))
    token = (labels >= 0) & (labels < wide.shape[-1])
    index = xp.expand_dims(xp.where(mask & token, labels, xp.zeros_like(labels)), axis=-1)
    logps = xp.squeeze(xp.take_along_axis(wide, index, axis=-1) - log_normaliser, axis=-1)
    logps = xp.where(token, logps, xp.full_like(logps, xp.nan))  # some libraries would wrap around
    return xp.where(mask, logps, xp.zeros_like(logps)), mask
