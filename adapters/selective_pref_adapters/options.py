"""The options of a loss, and of `selective-pref train`, `score` and `rows`, as dataclasses.

Imports no framework, so that `--help` is quick. The command line and the YAML file are made from them: a field's name
is the flag, its docstring (or its metadata) the help. The options of a loss are defined here only: `train`, TRL's
configuration and the Hugging Face loss read them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from selective_pref import Pool, Ties, VetoSides

ObjectiveName: TypeAlias = Literal["selective_dpo", "dpo", "simpo", "sft", "teacher_veto"]
LossName: TypeAlias = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
"""The pair losses, by TRL's names; `docs/maths.md` says which function each is."""
DivergenceName: TypeAlias = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
Truncation: TypeAlias = Literal["keep_start", "keep_end"]
SharePrefix: TypeAlias = Literal["auto", "off"]

PAPER_MAX_LENGTH = 4096
"""Tokens of prompt + completion in the paper (§5.1): the default, where the models can read so many."""


@dataclass(kw_only=True)
class SelectionOptions:
    """The numbers of Selective-DPO. The defaults of β and the ratio are the paper's (§5.1)."""

    beta: float = field(
        default=0.01, metadata={"help": "Strength of the pull towards the reference (SimPO's reward scale)."}
    )
    selection_ratio: float | tuple[float, float] = field(
        default=0.4,
        metadata={
            "help": "Share of each pool's tokens to keep, in (0, 1]; 1 is DPO. Two numbers: a share for the chosen and "
            "one for the rejected response."
        },
    )
    selection_pool: Pool = field(
        default="response",
        metadata={"help": "Which tokens compete: those of one response, of one pair, or of the micro-batch."},
    )
    selection_ties: Ties = field(
        default="share", metadata={"help": "What happens to tokens that stand exactly on the threshold."}
    )
    min_score: float | None = field(
        default=None,
        metadata={
            "help": "Keep only tokens whose score is above this (nats), at most selection_ratio of them; with ratio 1 "
            "the threshold alone."
        },
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "Assumed share of flipped labels, in [0, 0.5)."})
    sft_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of a supervised term beside the loss, over every chosen token (RPO)."},
    )


@dataclass(kw_only=True)
class LossOptions(SelectionOptions):
    """The numbers of every objective that has a name; each objective reads some of them (`UNREAD` lists the others)."""

    loss_type: tuple[LossName, ...] = field(
        default=("sigmoid",), metadata={"help": "The pair loss, by TRL's name; several are added up (MPO)."}
    )
    loss_weights: tuple[float, ...] | None = field(
        default=None, metadata={"help": "A weight for each loss_type; default 1."}
    )
    f_divergence_type: DivergenceName = field(
        default="reverse_kl", metadata={"help": "f-divergence between policy and reference (f-DPO)."}
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "Coefficient of alpha_divergence."})
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of discopop, in (0, 1]."})
    ld_alpha: float | None = field(
        default=None,
        metadata={"help": "What tokens behind the length of the shorter response count for, in [0, 1] (LD-DPO)."},
    )
    gamma: float = field(default=0.5, metadata={"help": "SimPO's target margin, in units of the reward."})
    veto_threshold: float = field(
        default=1.0,
        metadata={
            "help": "teacher_veto (experimental): a token is vetoed where the teacher (the reference) finds it so many "
            "nats less likely than the policy's own start (the scoring reference) does."
        },
    )
    veto_floor: float = field(
        default=2.0, metadata={"help": "teacher_veto: how far below the teacher a vetoed token is pushed, nats."}
    )
    veto_sides: VetoSides = field(
        default="both",
        metadata={"help": "teacher_veto: learn from both responses, or raise the chosen and lower the rejected only."},
    )

    def __post_init__(self) -> None:
        """Lists, which a file has in place of tuples, and a single name become tuples."""
        self.loss_type = (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)
        self.loss_weights = None if self.loss_weights is None else tuple(self.loss_weights)
        if isinstance(self.selection_ratio, list):
            self.selection_ratio = tuple(self.selection_ratio)


@dataclass(kw_only=True)
class TrainInputs:
    """What a run of `train` reads, where it writes, and its objective."""

    model: str
    """Policy to train: a folder or a hub id of a causal language model."""
    pairs: str
    """Preference rows: a .jsonl, .json, .parquet or .csv file, a folder, or a hub id (NAME:SPLIT); for objective sft
    rows of a prompt and one answer, too."""
    ref_model: str | None = None
    """Reference, run beside the policy: a folder or hub id of a model with the same tokenizer."""
    reference_store: str | None = None
    """A folder of stored log-probs, read instead of running a reference; with ref_model, which fills it first."""
    reference_space: str | None = None
    """Which reference's log-probs to read, where reference_store holds those of several."""
    scoring_ref_model: str | None = None
    """A second reference, from which scores are made, while the first anchors the reward."""
    scoring_reference_store: str | None = None
    """Likewise, from a store; with scoring_ref_model, which fills it first."""
    scoring_reference_space: str | None = None
    """Which one of scoring_reference_store."""
    output_dir: str = "runs/train"
    """Where everything is written; must be absent or empty, or a run to resume."""
    objective: ObjectiveName = "selective_dpo"
    """The loss. Distilled DPO is dpo with a stronger ref_model; sft reads the chosen side alone."""


@dataclass(kw_only=True)
class TrainConfig(LossOptions, TrainInputs):
    """Everything a run depends on: `TrainInputs`, the numbers of its loss, and the following."""

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
    data_cache: str = "auto"
    """Where token ids are kept and found again: a folder, auto for one beside the caches of datasets, off for none."""
    data_workers: int = 1
    """Processes that tokenise rows, where their ids are not in the cache."""
    streaming: bool = False
    """Read rows as they are needed, in their own order, and keep no ids; needs max_steps, and eval_pairs or
    eval_fraction 0."""
    lora_r: int | None = None
    """Train LoRA adapters of this rank in place of all weights. Without ref_model and reference_store the policy with
    its adapters switched off is the reference."""
    lora_alpha: float | None = None
    """What LoRA multiplies its update by, times lora_r; default: twice lora_r."""
    lora_dropout: float = 0.0
    """Dropout in front of the adapters."""
    lora_target_modules: tuple[str, ...] | None = None
    """Names of the layers that get an adapter, as q_proj v_proj; default: every linear layer but the head."""
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
    picture_pairs: int = 2
    """At each evaluation, keep the selection of so many held-out pairs, the first ones, as a picture; 0 for none."""
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
    share_prefix: SharePrefix = "auto"
    """auto computes a pair's prompt once, and no padding, wherever fused_head and the model allow it; off does not."""
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

    def __post_init__(self) -> None:
        """As `LossOptions`; and a list of modules becomes a tuple."""
        super().__post_init__()
        if self.lora_target_modules is not None:
            names = self.lora_target_modules
            self.lora_target_modules = (names,) if isinstance(names, str) else tuple(names)

    @property
    def reference_is_start(self) -> bool:
        """Whether the policy with its adapters switched off is the reference."""
        return self.lora_r is not None and self.ref_model is None and self.reference_store is None


_SELECTION = ("selection_ratio", "selection_pool", "selection_ties", "min_score")
PAIR_LOSS = (
    "loss_type",
    "loss_weights",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "discopop_tau",
    "ld_alpha",
)
"""Options that say which pair loss it is."""
_VETO = ("veto_threshold", "veto_floor", "veto_sides")
UNREAD: dict[str, tuple[str, ...]] = {
    "selective_dpo": ("gamma", *_VETO),
    "dpo": ("gamma", *_SELECTION, *_VETO),
    "simpo": (*PAIR_LOSS, *_SELECTION, *_VETO),
    "sft": ("beta", "gamma", "label_smoothing", "sft_weight", *PAIR_LOSS, *_SELECTION, *_VETO),
    "teacher_veto": ("beta", "gamma", "label_smoothing", "sft_weight", *PAIR_LOSS, *_SELECTION),
}
"""Options of the loss that an objective does not read: setting one is an error."""

MAY_CHANGE_ON_RESUME = frozenset(
    {
        "output_dir",
        "data_cache",
        "data_workers",
        "pairs",  # what the files hold is compared instead
        "eval_pairs",
        "eval_steps",
        "logging_steps",
        "picture_pairs",
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

MAY_DIFFER_ON_HOSTS = frozenset(
    {
        "model",
        "pairs",
        "eval_pairs",
        "ref_model",
        "reference_store",
        "scoring_ref_model",
        "scoring_reference_store",
        "output_dir",
        "deepspeed_config",
    }
)
"""Paths: a host may have its own copy. Every other option must be the same in all processes of a run."""


@dataclass(kw_only=True)
class ScoreConfig:
    """Whose log-probs, of which pairs, into which store; or what to do with the store instead."""

    store: str
    """Folder of the store; made where it is absent. It may hold any number of references."""
    ref_model: str | None = None
    """Reference: a folder or hub id of a causal language model; with --url, the name it is served under."""
    pairs: str | None = None
    """Preference rows: a .jsonl, .json, .parquet or .csv file, a folder, or a hub id (NAME:SPLIT)."""
    tokenizer: str | None = None
    """The policy's model or tokenizer: pairs are tokenised by it. Default: the reference's own."""
    max_length: int | None = None
    """Tokens of prompt + completion, the same as in training. Default: what the reference, and the policy that
    --tokenizer names, can read, at most 4096."""
    truncation_mode: Truncation = "keep_start"
    """keep_start cuts the end of what is too long, keep_end the start; the same as in training."""
    columns: str | None = None
    """Which columns hold what, where the rows' schema is not recognised: prompt=question,chosen=good,rejected=bad."""
    skip_malformed_rows: bool = False
    """Leave out rows that are no preference pair, or refused by the chat template (counted), instead of stopping."""
    data_cache: str = "auto"
    """Where token ids are kept and found again: a folder, auto for one beside the caches of datasets, off for none."""
    data_workers: int = 1
    """Processes that tokenise rows, where their ids are not in the cache."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the reference's weights; log-probs are stored in float32."""
    attention: str | None = None
    """Attention implementation, as transformers names them (eager, sdpa, …). Default: its choice."""
    batch_tokens: int = 16384
    """Token positions of one batch on a GPU; a CPU takes row after row."""
    flush_seconds: float = 30.0
    """What is computed is written at least this often: a kill loses no more."""
    url: str | None = None
    """A server that speaks OpenAI's completions protocol, up to and with /v1: it is asked instead of a local model."""
    protocol: Literal["completions", "prompt_logprobs"] = "completions"
    """How the server is asked: echoed prompts with log-probs, or vLLM's prompt_logprobs."""
    revision: str | None = None
    """Of what is served: change it whenever weights, adapters or dtype there change. Needed with --url."""
    concurrency: int = 4
    """Requests under way at once."""
    rows_per_request: int = 8
    """Rows in one request."""
    timeout: float = 120.0
    """Seconds to wait for an answer."""
    attempts: int = 20
    """How often a row is asked for, after pauses of 1 to 30 s, before it is given up: 20 times take seven minutes."""
    api_key_variable: str | None = None
    """Name of the environment variable that holds the server's API key (never the key itself)."""
    stat: bool = False
    """Only show what the store holds; with --pairs and --tokenizer or --ref-model, also how many rows it lacks."""
    verify: bool = False
    """Only compute a random sample of the stored rows again, and compare."""
    verify_rows: int = 64
    """Rows of that sample."""
    verify_seed: int = 0
    """Seed of that sample."""
    verify_tolerance: float | None = None
    """Largest difference in nats that passes. Default: 1e-3 for float32 on this machine; else 0.5, and of a server
    0.015 in the mean."""
    prune: bool = False
    """Only tidy up: damage, copies, leftovers and references without rows go, small files become large; with --pairs,
    other rows go, too."""
    space: str | None = None
    """Which reference --stat and --prune mean, by name or label. Default: all."""


@dataclass(kw_only=True)
class RowsConfig:
    """Which rows are looked at, with whose tokenizer, and cut to which length."""

    pairs: str
    """Preference rows: a .jsonl, .json, .parquet or .csv file, a folder, or a hub id (NAME:SPLIT)."""
    tokenizer: str
    """The policy: a folder or hub id with a tokenizer."""
    objective: ObjectiveName = "selective_dpo"
    """What is to be trained with the rows: sft reads the chosen side alone, and rows of a prompt and one answer."""
    rows: int = 3
    """How many rows to show, from the first one on; the summary is over all."""
    columns: str | None = None
    """Which columns hold what, where the rows' schema is not recognised: prompt=question,chosen=good,rejected=bad."""
    max_length: int | None = None
    """Tokens of prompt + completion, as in training. Default: what the model can read, at most 4096."""
    truncation_mode: Truncation = "keep_start"
    """keep_start cuts the end of what is too long, keep_end the start; as in training."""
    json: bool = False
    """Write one JSON object instead of text: everything that is shown, with all ids."""
