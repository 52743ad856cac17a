"""A Hugging Face causal LM → per-token log-probs of a batch, through the fused head where that gives the same numbers.

In: a causal LM (bare, under PEFT, or wrapped by a training engine) and a batch in the trainers' layout. Out: [2B T]
log-probs in at least float32. Every adapter asks here, so every adapter gets the same numbers.

`install_fused_head(model)` runs once, before a model is wrapped. It teaches the model to answer a call that carries
`completion_labels` with log-probs instead of logits. The head is still called as a module, so whatever gathers, shards
or checkpoints weights around modules (ZeRO-3, FSDP2) finds it where it expects it. A model whose head does anything
that the fused head does not (found by a test of its own forward, not by its name) is served by its logits, and a log
line says so.
"""

from __future__ import annotations

import logging
import types
from typing import Any

import torch
from torch import Tensor, nn

from selective_pref import per_token_logps
from selective_pref.fused import LogitStatistics, fused_logps_and_statistics, fused_per_token_logps
from selective_pref_adapters.batch import Batch, labels_of
from selective_pref_adapters.pairs import IGNORE_INDEX
from selective_pref_adapters.shared_prefix import Layout, continues, lay_out

logger = logging.getLogger(__name__)

_SERVED = "_selective_pref_head"  # the attribute that a model with a fused head carries


def model_per_token_logps(model: Any, batch: Batch) -> Tensor:
    """log π(token | what precedes it) of the completion tokens of a batch, 0 elsewhere: [2B T], at least float32.

    Args:
        model: a causal LM, or what wraps one; with a fused head if `install_fused_head` was called on it.
        batch: `input_ids`, `attention_mask`, `completion_mask`, each [2B T+1].
    """
    labels = labels_of(batch)
    if _is_served(model):
        return model(**_inputs(batch), completion_labels=labels)
    return _dense_logps(model(**_inputs(batch)).logits, labels)


def model_logps_and_statistics(model: Any, batch: Batch) -> tuple[Tensor, LogitStatistics]:
    """`model_per_token_logps`, and statistics of the logits for a training log, each [2B T] and 0 off the completions.

    Args: as `model_per_token_logps`.
    """
    labels = labels_of(batch)
    if _is_served(model):
        logps, *statistics = model(**_inputs(batch), completion_labels=labels, statistics=True)
    else:
        logps, *statistics = _dense_logps_and_statistics(model(**_inputs(batch)).logits, labels)
    entropy, mean_logits, is_top1 = statistics
    return logps, LogitStatistics(entropy=entropy, mean_logits=mean_logits, is_top1=is_top1)


def frozen_per_token_logps(model: Any, batch: Batch) -> Tensor:
    """`model_per_token_logps` of a model that does not learn, a reference: [2B T] without a gradient.

    On a CPU every row is scored by itself, without its padding. That costs nothing there, and the bits of a row then
    depend on the row alone: the same whether it was scored beside others, in another order, or long before. Every
    process calls the model as many times as its batch has rows, whatever they hold, so that sharded weights can be
    gathered together.

    Args:
        model: as in `model_per_token_logps`, in evaluation mode.
        batch: likewise; padding may stand on either side.
    """
    with torch.no_grad():
        if batch["input_ids"].is_cuda:
            return model_per_token_logps(model, batch).detach()
        if _rows_by_themselves(model):
            return model_per_token_logps(model, batch).detach()
        rows, width = batch["input_ids"].shape
        out = torch.zeros(rows, max(width - 1, 0))
        for row in range(rows):
            places = batch["attention_mask"][row].nonzero().squeeze(-1)
            alone = places if len(places) else torch.zeros(1, dtype=torch.int64)  # an empty row still takes its turn
            names = ("input_ids", "attention_mask", "completion_mask")
            logps = model_per_token_logps(model, {name: batch[name][row, alone].unsqueeze(0) for name in names})
            out = out.to(logps.dtype)
            out[row, alone[1:] - 1] = logps[0]
        return out


def _rows_by_themselves(model: Any) -> bool:
    """Whether the model computes every row of a batch by itself (and a prompt once for all rows that begin with it)."""
    causal = next((module for module in model.modules() if hasattr(module, _SERVED)), None)
    soft = any(getattr(getattr(m, "active_peft_config", None), "is_prompt_learning", False) for m in model.modules())
    if causal is None or soft or causal._share_prefix == "off":
        return False
    if not getattr(causal, _SERVED):
        setattr(causal, _SERVED, True)
        _decided(causal)
    return hasattr(causal.get_output_embeddings(), "_dense_forward") and continues(causal)


def install_fused_head(model: nn.Module, *, at_first_call: bool = False, share_prefix: str = "auto") -> bool:
    """Makes `model_per_token_logps` of this model use the fused head; returns whether it could.

    Args:
        model: a causal LM, or a PEFT model around one, on the device and in the dtype it will be used in, not yet
            wrapped by an engine. Calling twice is harmless.
        at_first_call: decide when the model is first asked for log-probs, and return True: for a model whose weights
            an engine will move, cast or shard (or has sharded already).
    """
    if share_prefix not in ("auto", "off"):
        raise ValueError(f"share_prefix must be 'auto' or 'off'; got {share_prefix!r}")
    causal = _causal_lm(model)
    causal._share_prefix = share_prefix
    if hasattr(causal, _SERVED):
        return True
    if not at_first_call and not _decided(causal):
        return False
    setattr(causal, _SERVED, not at_first_call)
    causal._dense_forward, causal.forward = causal.forward, types.MethodType(_forward, causal)
    return True


def _decided(causal: Any) -> bool:
    """Whether the fused head serves this model; teaches the head, or says why not."""
    reason = _why_not(causal)
    if reason is not None:
        logger.warning("%s is served by its logits, not by the fused head: %s", type(causal).__name__, reason)
        return False
    head = causal.get_output_embeddings()
    head._dense_forward, head.forward = head.forward, types.MethodType(_head_forward, head)
    return True


def _forward(
    self: Any, *args: Any, completion_labels: Tensor | None = None, statistics: bool = False, **kwargs: Any
) -> Any:
    """The causal LM's forward: its own without `completion_labels`; with them, log-probs [B T] (and statistics)."""
    if completion_labels is None:
        return self._dense_forward(*args, **kwargs)
    if not getattr(self, _SERVED):
        setattr(self, _SERVED, True)
        _decided(self)
    head = self.get_output_embeddings()
    if not hasattr(head, "_dense_forward"):  # not to be fused, or replaced since by an adapter of its own
        dense = _dense_logps_and_statistics if statistics else _dense_logps
        return dense(self._dense_forward(*args, **kwargs).logits, completion_labels)
    share = getattr(self, "_share_prefix", "auto") == "auto" and not args
    found = lay_out(self, kwargs, completion_labels, compiled=torch.compiler.is_compiling()) if share else None
    if found is not None:
        return _by_layout(self, found, completion_labels, statistics)
    hidden = self.base_model(*args, **kwargs)[0][:, -completion_labels.shape[1] :]  # a soft prompt stands in front
    options = {**_head_options(self.config), "statistics": statistics}
    return head(hidden[:, :-1], completion_labels=completion_labels[:, 1:], options=options)


def _by_layout(causal: Any, found: Layout, labels: Tensor, statistics: bool) -> Any:
    """Log-probs [B T] (and statistics) of a batch whose prompts are shared.

    Without gradients on a CPU the head, too, is called for each row by itself, so that the bits of a row's log-probs
    depend on that row alone. With them that would cost a gradient of the head's size for each row.
    """
    hidden, targets = found.states(causal), labels[found.rows, found.columns + 1]
    parts = [len(targets)] if torch.is_grad_enabled() or hidden.device.type != "cpu" else found.counts
    options = {**_head_options(causal.config), "statistics": statistics}
    head = causal.get_output_embeddings()
    outs = [
        head(states[None], completion_labels=some[None], options=options)
        for states, some in zip(hidden.split(parts), targets.to(hidden.device).split(parts), strict=True)
    ]
    if not statistics:
        return _spread(torch.cat(outs, dim=1)[0], found, labels)
    return tuple(_spread(torch.cat(column, dim=1)[0], found, labels) for column in zip(*outs, strict=True))


def _spread(values: Tensor, found: Layout, labels: Tensor) -> Tensor:
    """Values of the completion tokens [M] at their places in [B T], 0 elsewhere."""
    out = values.new_zeros(labels.shape[0], labels.shape[1] - 1)
    return out.index_put((found.rows.to(values.device), found.columns.to(values.device)), values)


def _head_forward(
    self: Any, hidden: Tensor, completion_labels: Tensor | None = None, options: dict[str, Any] | None = None
) -> Any:
    """The head's forward: its own without `completion_labels`; with them, the fused one."""
    if completion_labels is None:
        return self._dense_forward(hidden)
    labels, options = completion_labels.to(hidden.device), dict(options or {})
    if not options.pop("statistics", False):
        return fused_per_token_logps(hidden, self.weight, labels, bias=self.bias, **options)
    logps, found = fused_logps_and_statistics(hidden, self.weight, labels, bias=self.bias, **options)
    return logps, found.entropy, found.mean_logits, found.is_top1


def _is_served(model: Any) -> bool:
    return any(hasattr(module, _SERVED) for module in model.modules())


def _inputs(batch: Batch) -> dict[str, Any]:
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}


def _dense_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs [B T] from logits; those of a soft prompt stand in front of the others and are left out."""
    return per_token_logps(logits[:, -labels.shape[1] :], labels)[0]


def _dense_logps_and_statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """(log-probs, entropy, mean logit, whether the label is the top one), each [B T] and 0 off the completions."""
    with torch.no_grad():
        shifted, targets = logits[:, -labels.shape[1] : -1].float(), labels[:, 1:]
        counts = targets != IGNORE_INDEX
        logps = shifted.log_softmax(-1)
        entropy = -torch.where(logps.exp() > 0, logps.exp() * logps, 0.0).sum(-1)
        found = shifted.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        is_top1 = (found >= shifted.amax(-1)) & counts
    return _dense_logps(logits, labels), entropy * counts, shifted.mean(-1) * counts, is_top1


def _causal_lm(model: nn.Module) -> Any:
    """The transformers model inside PEFT's wrappers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head_options(config: Any) -> dict[str, float | None]:
    """The scale and the soft cap that a configuration names, as `fused_per_token_logps` takes them."""
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies
    scaling = getattr(config, "logits_scaling", None)  # Granite divides
    return {
        "logit_scale": float(scale or 1.0) / float(scaling or 1.0),
        "softcap": getattr(config, "final_logit_softcapping", None),
    }


def _why_not(causal: Any) -> str | None:
    """None where the fused head computes this model's log-probs; otherwise what stands against it.

    The model's own forward is run once with its head replaced by a fixed ramp of products: what comes out must be our
    transform of the ramp (over the whole range of logits, not only what today's weights produce), and what went into
    the head must be the body's output.
    """
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    if type(head) is not nn.Linear:
        return f"its output layer is {type(head).__name__}, not a plain linear one"
    seen: list[Tensor] = []
    ramp = torch.linspace(-200, 200, head.out_features, device=head.weight.device, dtype=torch.float32)

    def record(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return ramp.to(hidden.dtype).expand(*hidden.shape[:-1], -1).clone()

    ids = torch.arange(3, device=head.weight.device).unsqueeze(0) % head.out_features
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    own, training = head.forward, causal.training
    try:
        causal.eval()
        head.forward = record
        with torch.no_grad():
            logits = getattr(causal, "_dense_forward", causal)(**inputs).logits
            hidden = causal.base_model(**inputs)[0]
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        return f"its forward cannot be taken apart: {type(error).__name__}: {error}"
    finally:
        head.forward = own
        if "forward" in vars(head) and own.__func__ is type(head).forward:
            del head.forward
        causal.train(training)
    options = _head_options(causal.config)
    expected = ramp.to(hidden.dtype) * options["logit_scale"]
    if options["softcap"] is not None:
        expected = torch.tanh(expected / options["softcap"]) * options["softcap"]
    tolerance = 8 * torch.finfo(hidden.dtype).eps
    if logits.shape[-1] != head.out_features or not torch.allclose(
        logits[0, 0].float(), expected.float(), rtol=tolerance, atol=200 * tolerance
    ):
        return "it changes its logits in a way that its configuration does not name"
    if len(seen) != 1 or seen[0].shape != hidden.shape or not torch.allclose(seen[0], hidden, equal_nan=True):
        return "something stands between its body and its head"
    return None
