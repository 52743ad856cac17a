"""Everything a training run depends on, as one dataclass. Imports no framework: `--help` is quick.

The command line and the YAML file are made from it: a field's name is the flag, its docstring the help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from selective_pref import Pool, Ties

ObjectiveName: TypeAlias = Literal["selective_dpo", "dpo", "simpo", "sft"]
Truncation: TypeAlias = Literal["keep_start", "keep_end"]


@dataclass(kw_only=True)
class TrainConfig:
    """Everything a run depends on. The defaults of β and the ratio are the paper's (§5.1)."""

    model: str
    """Policy to train: a folder or a hub id of a causal language model."""
    pairs: str
    """Preference rows: a .jsonl, .json, .parquet or .csv file, a folder, or a hub id (NAME:SPLIT)."""
    ref_model: str | None = None
    """Reference, run beside the policy: a folder or hub id of a model with the same tokenizer."""
    reference_store: str | None = None
    """Instead of ref_model: a folder of stored log-probs; no reference is loaded then."""
    reference_space: str | None = None
    """Which reference's log-probs to read, where reference_store holds those of several."""
    scoring_ref_model: str | None = None
    """A second reference that scores the tokens, while the first anchors the reward."""
    scoring_reference_store: str | None = None
    """Likewise, from a store."""
    scoring_reference_space: str | None = None
    """Which one of scoring_reference_store."""
    output_dir: str = "runs/train"
    """Where everything is written; must be absent or empty, or a run to resume."""
    objective: ObjectiveName = "selective_dpo"
    """The loss. Distilled DPO is dpo with a stronger ref_model."""
    beta: float = 0.01
    """Strength of the pull towards the reference (SimPO's reward scale)."""
    selection_ratio: float = 0.4
    """Share of each pool's tokens to keep, in (0, 1]; 1 is DPO."""
    selection_pool: Pool = "response"
    """Which tokens compete: those of one response, of one pair, or of the micro-batch."""
    selection_ties: Ties = "share"
    """What happens to tokens that stand exactly on the threshold."""
    gamma: float = 0.5
    """SimPO's target margin, in units of the reward."""
    label_smoothing: float = 0.0
    """Assumed share of flipped labels, in [0, 0.5)."""
    eval_pairs: str | None = None
    """Held-out rows; without them, eval_fraction of the rows is held out, by prompt."""
    eval_fraction: float = 0.05
    """Share of the rows to hold out where eval_pairs is not given; 0 for none."""
    max_length: int | None = None
    """Tokens of prompt + completion; default: what both models can read, at most the paper's 4096."""
    truncation_mode: Truncation = "keep_start"
    """keep_start cuts the end of what is too long, keep_end the start."""
    columns: str | None = None
    """Which columns hold what, where the rows' schema is not recognised: prompt=question,chosen=good,rejected=bad."""
    skip_malformed_rows: bool = False
    """Leave out rows that are no preference pair, or refused by the chat template (counted), instead of stopping."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape after the warm-up: to 0 at the last step, or constant."""
    warmup_steps: int = 0
    """Optimiser steps of linear warm-up."""
    weight_decay: float = 0.0
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    epochs: float = 1.0
    """Passes over the training pairs."""
    max_steps: int | None = None
    """Optimiser steps; overrides epochs."""
    batch_size: int = 8
    """Pairs of one forward pass of one process."""
    gradient_accumulation_steps: int = 1
    """Forward passes of one optimiser step."""
    global_batch_size: int | None = None
    """Pairs of one optimiser step over all processes; sets gradient_accumulation_steps by itself."""
    group_by_length: bool = False
    """Put pairs of like length into one step, so that less is padding; the order of the steps stays random."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    eval_steps: int | None = None
    """Evaluate every so many steps; it is always done before the first and after the last."""
    logging_steps: int = 10
    """Write metrics every so many steps: means over them, with the last step's gradient norm."""
    tracker: Literal["none", "wandb", "trackio"] = "none"
    """Also send the metrics there; TensorBoard events are always written."""
    save_steps: int | None = None
    """Write a checkpoint every so many steps; without it only when told to stop (SIGTERM)."""
    keep_checkpoints: int = 2
    """How many complete checkpoints to keep, the newest."""
    resume: str | None = None
    """"auto" goes on from the newest complete checkpoint in output_dir, if there is any; or name a checkpoint."""
    force_resume: bool = False
    """Resume although something that shapes the run has changed (it is listed)."""
    non_finite: Literal["raise", "skip"] = "raise"
    """At a loss or gradient that is NaN or infinite: stop, or leave the batch out on all processes and count it."""
    seed: int = 0
    """Order of the data, choice of held-out prompts."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the models' weights; log-probs and losses are float32 at least."""
    fused_head: bool = True
    """Compute log-probs without materialising the logits, wherever the model allows it."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed's ZeRO stage."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in the memory of the host; from ZeRO stage 1 on."""
    offload_parameters: bool = False
    """Keep the sharded parameters there too, of policy and reference; ZeRO stage 3."""
    deepspeed_config: str | None = None
    """A JSON file of further DeepSpeed settings, such as bucket sizes; what the flags here decide is refused."""
    process_timeout_minutes: float = 30.0
    """How long processes wait for one another before the run ends with an error."""


_SELECTION = ("selection_ratio", "selection_pool", "selection_ties")
UNREAD: dict[str, tuple[str, ...]] = {
    "selective_dpo": ("gamma",),
    "dpo": ("gamma", *_SELECTION),
    "simpo": _SELECTION,
    "sft": ("beta", "gamma", "label_smoothing", *_SELECTION),
}
"""Options of the loss that an objective has no use for: setting one is an error, not a shrug."""

MAY_CHANGE_ON_RESUME = frozenset(
    {
        "output_dir",
        "pairs",  # what the files hold is compared instead
        "eval_pairs",
        "eval_steps",
        "logging_steps",
        "tracker",
        "save_steps",
        "keep_checkpoints",
        "resume",
        "force_resume",
        "non_finite",
        "process_timeout_minutes",
    }
)
"""Options that leave the weights as they would have been; a change of any other is refused when a run is resumed."""
