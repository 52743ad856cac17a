"""A Hugging Face causal LM → per-token log-probs of a batch, through the fused head where that gives the same numbers.

In: a causal LM (bare, under PEFT, or wrapped by a training engine) and a batch in the trainers' layout. Out: [2B T]
log-probs in at least float32. Every adapter asks here, so every adapter gets the same numbers.

`install_fused_head(model)` runs once, before a model is wrapped. It puts `WithFusedHead` in front of the model's
class, so that a call with `completion_labels` is answered by log-probs instead of logits. Nothing else about the model
changes: its other calls, the signature of its forward, generation, saving, pickles and copies are those of its own
class. The head is still called as a module, so whatever gathers, shards or checkpoints weights around modules (ZeRO-3,
FSDP2) finds it where it expects it. A model whose head does anything that the fused head does not (found by a test of
its own forward, not by its name) is served by its logits, and a log line says so.

Before the head comes the body: `shared_prefix` decides how the rows of a batch go through it.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selective_pref import per_token_logps
from selective_pref.fused import LogitStatistics, fused_logps_and_statistics, fused_per_token_logps
from selective_pref_adapters.batch import Batch, labels_of
from selective_pref_adapters.model_inputs import causal_lm, has_soft_prompt, inputs_of
from selective_pref_adapters.models import evaluating, text_config
from selective_pref_adapters.pairs import IGNORE_INDEX
from selective_pref_adapters.shared_prefix import continues, lay_out, prepare

logger = logging.getLogger(__name__)

Options = dict[str, Any]  # logit_scale and softcap, as `fused_per_token_logps` takes them


def model_per_token_logps(model: Any, batch: Batch) -> Tensor:
    """log π(token | what precedes it) of the completion tokens of a batch, 0 elsewhere: [2B T], at least float32.

    Args:
        model: a causal LM, or what wraps one; with a fused head if `install_fused_head` was called on it.
        batch: `input_ids`, `attention_mask`, `completion_mask`, each [2B T+1], and whatever else the model's forward
            takes (see `inputs_of`).
    """
    labels = labels_of(batch)
    if isinstance(causal_lm(model), WithFusedHead):
        return model(**inputs_of(model, batch), completion_labels=labels)
    return _dense_logps(model(**inputs_of(model, batch)).logits, labels)


def model_logps_and_statistics(
    model: Any, batch: Batch, *, auxiliary_loss: bool = False
) -> tuple[Tensor, LogitStatistics, Tensor | None]:
    """`model_per_token_logps`, statistics of the logits, each [2B T] and 0 off the completions, and the auxiliary loss.

    Args:
        model, batch: as `model_per_token_logps`.
        auxiliary_loss: whether the load-balancing loss [] of a mixture of experts is wanted; its forward then takes
            `output_router_logits`. Without it, None stands in its place.
    """
    labels, inputs = labels_of(batch), inputs_of(model, batch)
    if auxiliary_loss:
        inputs["output_router_logits"] = True
    if isinstance(causal_lm(model), WithFusedHead):
        logps, *found = model(**inputs, completion_labels=labels, statistics=True)
    else:
        outputs = model(**inputs)
        logps, *found = _dense_logps_and_statistics(outputs.logits, labels)
        found += [outputs.aux_loss] if auxiliary_loss else []
    entropy, mean_logits, is_top1, squares, *auxiliary = found
    statistics = LogitStatistics(entropy=entropy, mean_logits=mean_logits, is_top1=is_top1, log_sum_sq_probs=squares)
    return logps, statistics, auxiliary[0] if auxiliary else None


def frozen_per_token_logps(model: Any, batch: Batch) -> Tensor:
    """`model_per_token_logps` of a model that does not learn, a reference: [2B T] without a gradient.

    It is the policy's call with the policy's shapes: some processors' matrix products differ in their last bits from
    shape to shape, so only then do equal weights give equal bits, and scores of exactly 0 (Eq. 6).

    Args:
        model: as in `model_per_token_logps`, in evaluation mode.
        batch: the batch that the policy reads.
    """
    with torch.no_grad():
        return model_per_token_logps(model, batch).detach()


def computes_rows_by_themselves(model: Any) -> bool:
    """Whether `row_per_token_logps` is for this model: on a CPU, where its rows can be computed one by one.

    Args:
        model: a causal LM, or a PEFT model around one, with a fused head; without an engine.
    """
    causal = causal_lm(model)
    shares = isinstance(causal, WithFusedHead) and causal._share_prefix == "auto" and not has_soft_prompt(model)
    return shares and _is_fused(causal) and continues(causal)


def row_per_token_logps(model: Any, batch: Batch) -> Tensor:
    """`frozen_per_token_logps`, but the bits of a row's log-probs depend on that row alone: [2B T].

    A prompt that several rows begin with is computed once all the same.

    Args:
        model: one that `computes_rows_by_themselves`, in evaluation mode.
        batch: `input_ids`, `attention_mask`, `completion_mask`, each [2B T+1].
    """
    with torch.no_grad():
        return model(**inputs_of(model, batch), completion_labels=labels_of(batch), by_row=True).detach()


# --- the fused head in a model ---------------------------------------------------------------------------------------


def install_fused_head(
    model: nn.Module, *, at_first_call: bool = False, share_prefix: Literal["auto", "off"] | None = None
) -> bool:
    """Makes `model_per_token_logps` of this model use the fused head; returns whether it could.

    Args:
        model: a causal LM, or a PEFT model around one, on the device and in the dtype it will be used in, not yet
            wrapped by an engine. Calling twice is harmless.
        at_first_call: decide when the model is first asked for log-probs, and return True: for a model whose weights
            an engine will move, cast or shard (or has sharded already).
        share_prefix: `auto` computes a prompt once for all rows that begin with it, where that gives the model's own
            numbers; `off` never does. None leaves it as it was: at first, `auto`.

    Raises:
        ValueError: `share_prefix` is something else.
    """
    if share_prefix not in ("auto", "off", None):
        raise ValueError(f"share_prefix must be 'auto' or 'off'; got {share_prefix!r}")
    causal = causal_lm(model)
    if isinstance(causal, WithFusedHead):
        causal._share_prefix = share_prefix or causal._share_prefix
        return True
    if "forward" in vars(causal):
        _log_why_not(causal, f"its forward is not its class's own: {_REPLACED}")
        return False
    options = None if at_first_call else _decide(causal)
    if options is False:
        return False
    causal._fused_head, causal.__class__ = options, _class_with_fused_head(type(causal))
    causal._share_prefix = share_prefix or "auto"
    if not at_first_call and causal._share_prefix == "auto":
        prepare(causal)
    return True


class WithFusedHead:
    """Stands in front of the class of a causal LM; `forward` is made for each class by `_class_with_fused_head`.

    Pickled, a model is of its own class again, so that it can be read where this package is not installed. A copy has
    the fused head, too.
    """

    _fused_head = None  # options, once decided
    _share_prefix = "auto"

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _as_its_own_class(self):
            maker, *others = self.__reduce_ex__(max(protocol, 2))
        # A pickler compares the class that `__newobj__` is to make with the object's.
        return (object.__new__ if maker is copyreg.__newobj__ else maker, *others)

    def __deepcopy__(self, memo: Any) -> Any:
        kind = type(self)
        with _as_its_own_class(self):
            twin = copy.deepcopy(self, memo)
        twin.__class__ = kind
        return twin


@contextmanager
def _as_its_own_class(causal: Any) -> Iterator[None]:
    kind = type(causal)
    causal.__class__ = causal._own_class
    try:
        yield
    finally:
        causal.__class__ = kind


@functools.cache
def _class_with_fused_head(own: Any) -> type:
    """A subclass with the name and the signatures of `own`, whose forward knows `completion_labels`."""

    def forward(
        self: Any,
        *args: Any,
        completion_labels: Tensor | None = None,
        statistics: bool = False,
        by_row: bool = False,
        **kwargs: Any,
    ) -> Any:
        if completion_labels is None:
            return own.forward(self, *args, **kwargs)
        if kwargs.get("output_router_logits"):
            return _with_auxiliary_loss(self, functools.partial(own.forward, self, *args, **kwargs), completion_labels)
        if not _is_fused(self):
            dense = _dense_logps_and_statistics if statistics else _dense_logps
            return dense(own.forward(self, *args, **kwargs).logits, completion_labels)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # not every body takes `labels`
        if self._share_prefix == "auto" and not args:
            compiled = torch.compiler.is_compiling()
            layout = lay_out(self, kwargs, completion_labels, by_row=by_row, compiled=compiled)
            if layout is not None:
                head = functools.partial(_call_head, self, statistics=statistics)
                return layout.outputs(layout.states(self), head, completion_labels, by_row=by_row)
        hidden = self.base_model(*args, **kwargs)[0][
            :, -completion_labels.shape[1] :
        ]  # prompt tuning prepends virtual tokens
        return _call_head(self, hidden[:, :-1], completion_labels[:, 1:], statistics=statistics)

    functools.update_wrapper(forward, own.forward)
    vars(forward)["__signature__"] = inspect.signature(own.forward)
    del vars(forward)["__wrapped__"]  # accelerate would unwrap it, and call the forward without what decorates it
    names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(own.__name__, (WithFusedHead, own), {**names, "forward": forward, "_own_class": own})


@torch.compiler.disable  # a test run of the model, and changes of the head that a graph could not hold
def _is_fused(causal: Any) -> bool:
    """Whether the head can be called for log-probs: decided once, and no adapter or hook was put on it since."""
    if causal._fused_head is None:
        causal._fused_head = _decide(causal)
    return causal._fused_head is not False and _not_plain(causal.get_output_embeddings()) is None


def _with_auxiliary_loss(causal: Any, forward: Callable[[], Any], labels: Tensor) -> tuple[Tensor, ...]:
    """(log-probs, statistics, load-balancing loss []), the last from the model's own forward.

    Where the head is fused, another module stands in its place in that forward: FSDP2 gathers the last norm and the
    head together until each was called once, and takes their weights away in the backward pass of a second call.
    """
    if not _is_fused(causal):
        outputs = forward()
        return (*_dense_logps_and_statistics(outputs.logits, labels), outputs.aux_loss)
    seen: list[Tensor] = []
    with _replaced(causal, causal.get_output_embeddings(), _Keeps(seen)):
        auxiliary = forward().aux_loss
    hidden = seen[0][:, -labels.shape[1] :]  # prompt tuning prepends virtual tokens
    return (*_call_head(causal, hidden[:, :-1], labels[:, 1:], statistics=True), auxiliary)


class _Keeps(nn.Module):
    """Keeps the hidden states that a head would get, and gives one column of them for logits, which nothing reads."""

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self._seen = seen

    def forward(self, hidden: Tensor) -> Tensor:
        self._seen.append(hidden)
        return hidden[..., :1]


@contextmanager
def _replaced(model: nn.Module, module: nn.Module, other: nn.Module) -> Iterator[None]:
    """Another module in the place of one of a model's, as long as the block runs."""
    parents = [(one, name) for one in model.modules() for name, child in one.named_children() if child is module]
    for parent, name in parents:
        setattr(parent, name, other)
    try:
        yield
    finally:
        for parent, name in parents:
            setattr(parent, name, module)


@torch.compiler.disable
def _call_head(causal: Any, hidden: Tensor, labels: Tensor, *, statistics: bool) -> Any:
    """Log-probs [B T] (and statistics) from the head, which is called as a module with its forward replaced."""
    head, options = causal.get_output_embeddings(), causal._fused_head

    def fused(hidden: Tensor) -> Any:  # no views: FSDP2 warns of them
        targets = labels.to(hidden.device)
        if not statistics:
            return fused_per_token_logps(hidden, head.weight, targets, bias=head.bias, **options).clone()
        logps, found = fused_logps_and_statistics(hidden, head.weight, targets, bias=head.bias, **options)
        return logps.clone(), found.entropy, found.mean_logits, found.is_top1, found.log_sum_sq_probs

    with _forward_replaced(head, fused):
        return head(hidden)


@contextmanager
def _forward_replaced(head: nn.Module, forward: Callable[[Tensor], Any]) -> Iterator[None]:
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


# --- by logits -------------------------------------------------------------------------------------------------------


def _dense_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs [B T] from logits, of which only the last positions are the batch's: prompt tuning prepends others."""
    return per_token_logps(logits[:, -labels.shape[1] :], labels)[0]


def _dense_logps_and_statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """(log-probs, entropy, mean logit, whether the label is the top one, log Σ p²), [B T] and 0 off the completions."""
    with torch.no_grad():
        shifted, targets = logits[:, -labels.shape[1] : -1].float(), labels[:, 1:]
        counts = targets != IGNORE_INDEX
        logps = shifted.log_softmax(-1)
        entropy = -torch.where(logps.exp() > 0, logps.exp() * logps, 0.0).sum(-1)
        found = shifted.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        is_top1 = (found >= shifted.amax(-1)) & counts
        squares = torch.where(counts, (2 * logps).logsumexp(-1), 0.0)
    return _dense_logps(logits, labels), entropy * counts, shifted.mean(-1) * counts, is_top1, squares


# --- whether the fused head gives the same numbers -------------------------------------------------------------------

_PLAIN: Options = {"logit_scale": 1.0, "softcap": None}
_REPLACED = (
    "accelerate has put hooks on it (device_map, offload), or an earlier trainer or a patch has replaced it on this "
    "object (then load the model anew)"
)


def _decide(causal: Any) -> Options | Literal[False]:
    """The options with which the fused head serves this model; False where it does not, and a log line says why."""
    found = _fitting_options(causal)
    if isinstance(found, str):
        _log_why_not(causal, found)
        return False
    return found


def _log_why_not(causal: Any, reason: str) -> None:
    logger.warning("%s is served by its logits, not by the fused head: %s", type(causal).__name__, reason)


def _named_options(causal: Any) -> Options:
    """The scale and the soft cap that a model's configuration names, as `fused_per_token_logps` takes them."""
    config = text_config(causal)
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies
    scaling = getattr(config, "logits_scaling", None)  # Granite divides
    return {
        "logit_scale": float(scale or 1.0) / float(scaling or 1.0),
        "softcap": getattr(config, "final_logit_softcapping", None),
    }


def _not_plain(head: Any) -> str | None:
    """None for a linear layer with the forward of `nn.Linear`; otherwise what it is."""
    if getattr(type(head), "forward", None) is not nn.Linear.forward:
        return f"its output layer is {type(head).__name__}, not a plain linear one"
    if "forward" in vars(head):
        return f"the forward of its output layer is not its class's own: {_REPLACED}"
    return None


def _fitting_options(causal: Any) -> Options | str:
    """The options with which the fused head computes this model's log-probs; otherwise what stands against it.

    The model's own forward is run once with its head replaced by a fixed ramp of products: what comes out must be our
    transform of the ramp (over the whole range of logits, not only what today's weights produce), and what went into
    the head must be the body's output. Some models of text and images do not apply what their text part's
    configuration names, so the ramp may also come out as it went in.
    """
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    if (reason := _not_plain(head)) is not None:
        return reason
    seen: list[Tensor] = []
    ramp = torch.linspace(-200, 200, head.out_features, device=head.weight.device, dtype=torch.float32)

    def record(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return ramp.to(hidden.dtype).expand(*hidden.shape[:-1], -1).clone()

    ids = torch.arange(3, device=head.weight.device).unsqueeze(0) % head.out_features
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    try:
        with torch.no_grad(), evaluating(causal), _forward_replaced(head, record):
            # At the first call this runs inside the model's forward, so what wraps that (autocast) must not run again.
            inside = isinstance(causal, WithFusedHead)
            logits = (type(causal).forward(causal, **inputs) if inside else causal(**inputs)).logits
            hidden = causal.base_model(**inputs)[0]
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, AssertionError) as error:
        return f"its forward cannot be taken apart: {type(error).__name__}: {error}"
    changed = len(seen) != 1 or seen[0].shape != hidden.shape or seen[0].dtype != hidden.dtype  # Mamba casts, in bf16
    if changed or not torch.allclose(seen[0], hidden, equal_nan=True):
        return "something stands between its body and its head"
    tolerance = 8 * torch.finfo(hidden.dtype).eps
    for options in (_named_options(causal), _PLAIN):
        expected = ramp.to(hidden.dtype) * options["logit_scale"]
        if (cap := options["softcap"]) is not None:
            expected = torch.tanh(expected / cap) * cap
        if logits.shape[-1] == head.out_features and torch.allclose(
            logits[0, 0].float(), expected.float(), rtol=tolerance, atol=200 * tolerance
        ):
            return options
    return "it changes its logits in a way that its configuration does not name"
