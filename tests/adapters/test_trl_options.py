"""Options of `DPOConfig` through `SelectiveDPOTrainer`: at ratio 1 every step is the stock trainer's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
)
from trl import DPOConfig, DPOTrainer

from selective_pref_adapters.models import keep_trainable_in_4_bits
from selective_pref_adapters.trl_trainer import SelectiveDPOConfig, SelectiveDPOTrainer
from tiny import (
    make_mixture,
    make_model,
    make_model_with_processor,
    make_text_and_image_model,
    needs_experts,
    text_rows,
)

ROWS = text_rows(12)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def settings(folder: Path, **changed: Any) -> dict[str, Any]:
    always = {"output_dir": str(folder / "out"), "use_cpu": True, "bf16": False, "report_to": [], "logging_steps": 1}
    always |= {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_strategy": "no"}
    return {**always, "max_length": 64, "disable_tqdm": True, "beta": 0.1, **changed}


@pytest.fixture(scope="module")
def mixture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(tmp_path_factory.mktemp("mixture"), seed=1)


def steps(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def run(policy: Path, reference: Path, args: Any, rows: Any = ROWS, trainer: Any = None) -> list[dict[str, float]]:
    trainer = trainer or (SelectiveDPOTrainer if isinstance(args, SelectiveDPOConfig) else DPOTrainer)
    return steps(
        trainer(
            model=str(policy),
            ref_model=load(reference),
            args=args,
            train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
            processing_class=AutoTokenizer.from_pretrained(policy),
        )
    )


def assert_alike(policy: Path, reference: Path, tmp_path: Path, **options: Any) -> list[dict[str, float]]:
    theirs = run(policy, reference, DPOConfig(**settings(tmp_path, **options)))
    ours = run(policy, reference, SelectiveDPOConfig(**settings(tmp_path, selection_ratio=1.0, **options)))
    for expected, got in zip(theirs, ours, strict=True):
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    return ours


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "ipo"},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": "sft"},
        {"loss_type": "aot", "label_smoothing": 0.1},
        {"loss_type": "discopop", "discopop_tau": 0.1},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"use_weighting": True},
        {"loss_weights": [1.0], "ld_alpha": 1.0, "padding_free": True},
    ],
    ids=str,
)
def test_each_option_is_the_stock_trainers(
    policy_folder: Path, reference_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    assert_alike(policy_folder, reference_folder, tmp_path, **options)


def test_length_desensitisation_is_the_stock_trainers_but_for_the_rewards_that_are_logged(
    policy_folder: Path, reference_folder: Path, tmp_path: Path
) -> None:
    """TRL logs rewards and log-probs of the weighted tokens; here those names are always of the full sequences."""
    theirs = run(policy_folder, reference_folder, DPOConfig(**settings(tmp_path, ld_alpha=0.3)))
    ours = SelectiveDPOConfig(**settings(tmp_path, selection_ratio=1.0, ld_alpha=0.3))
    for expected, got in zip(theirs, run(policy_folder, reference_folder, ours), strict=True):
        assert [got[name] for name in ("loss", "grad_norm")] == pytest.approx(
            [expected[name] for name in ("loss", "grad_norm")], rel=1e-4
        )
        assert got["selection/rewards/margins"] == pytest.approx(expected["rewards/margins"], rel=1e-4)


@needs_experts
@pytest.mark.parametrize("coefficient", [None, 0.5])
@pytest.mark.parametrize("fused", [True, False])
def test_a_mixture_of_experts_learns_its_load_balance_as_the_stock_trainer_has_it(
    mixture_folder: Path, reference_folder: Path, tmp_path: Path, coefficient: float | None, fused: bool
) -> None:
    args = settings(tmp_path, router_aux_loss_coef=coefficient)
    theirs = run(mixture_folder, reference_folder, DPOConfig(**args))
    ours = run(mixture_folder, reference_folder, SelectiveDPOConfig(**args, selection_ratio=1.0, fused_head=fused))
    for expected, got in zip(theirs, ours, strict=True):
        assert expected["aux_loss"] > 1
        for name in ("loss", "grad_norm", "aux_loss"):
            assert got[name] == pytest.approx(expected[name], rel=1e-4)


def test_rows_count_for_their_weight(policy_folder: Path, reference_folder: Path, tmp_path: Path) -> None:
    """A weight of 0 is as good as a row that is not there, twice the weight as good as the row twice."""
    args = {"max_steps": 1, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 1, "selection_ratio": 0.4}

    def first(rows: list[Any], **changed: Any) -> dict[str, float]:
        return run(
            policy_folder, reference_folder, SelectiveDPOConfig(**settings(tmp_path, **{**args, **changed})), rows
        )[0]

    weighted = first([{**row, "weight": weight} for row, weight in zip(ROWS[:3], [0.0, 1.0, 2.0], strict=True)])
    repeated = first([ROWS[1], ROWS[2], ROWS[2]])
    assert weighted["grad_norm"] == pytest.approx(repeated["grad_norm"], rel=1e-5)
    assert weighted["loss"] == pytest.approx(repeated["loss"], rel=1e-5)
    assert weighted["pair_weight"] == pytest.approx(1.0)
    assert first(ROWS[:3])["grad_norm"] != pytest.approx(repeated["grad_norm"], rel=1e-3)


def test_weights_of_rows_and_of_the_policy_are_multiplied(
    policy_folder: Path, reference_folder: Path, tmp_path: Path
) -> None:
    args = settings(tmp_path, max_steps=1, use_weighting=True, selection_ratio=0.4)

    def first(rows: list[Any]) -> dict[str, float]:
        return run(policy_folder, reference_folder, SelectiveDPOConfig(**args), rows)[0]

    plain, twice = first(ROWS[:4]), first([{**row, "weight": 2} for row in ROWS[:4]])
    for name in ("loss", "grad_norm", "pair_weight"):
        assert twice[name] == pytest.approx(2 * plain[name], rel=1e-5)


@pytest.mark.parametrize("stock", [False, True])
def test_the_rows_of_a_stream_have_weights(
    policy_folder: Path, reference_folder: Path, tmp_path: Path, stock: bool
) -> None:
    args = {"max_steps": 1, "per_device_train_batch_size": 3, "selection_ratio": 0.4, "stock_tokenization": stock}
    args |= {"accelerator_config": {"dispatch_batches": False}}
    rows = [{**row, "weight": weight} for row, weight in zip(ROWS[:3], [0.0, 1.0, 2.0], strict=True)]

    def first(data: Any) -> dict[str, float]:
        return run(policy_folder, reference_folder, SelectiveDPOConfig(**settings(tmp_path, **args)), data)[0]

    stream, whole = first(Dataset.from_list(rows).to_iterable_dataset()), first(rows)
    assert stream["pair_weight"] == whole["pair_weight"] == 1.0
    assert stream["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert "pair_weight" not in first(Dataset.from_list(ROWS[:3]).to_iterable_dataset())


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ([1.0, -1.0], {}, "train, row 1: 'weight', .* at least 0; got -1.0"),
        ([float("inf"), 1.0], {"stock_tokenization": True}, "train, row 0: 'weight', .* a finite number"),
        ([0.0, 0.0], {}, "train: every weight is 0"),
        ([1.0, None], {}, r"train: 1 of 2 rows have a weight, the others \(the first is number 2\) have none"),
        ([1.0, 2.0], {"loss_type": "aot"}, "pairs cannot be weighted .* under aot: it sorts the batch"),
    ],
)
def test_weights_that_mean_nothing(
    policy_folder: Path, reference_folder: Path, tmp_path: Path, weights: list[float], options: Any, message: str
) -> None:
    rows = [{**row, "weight": weight} for row, weight in zip(ROWS[:2], weights, strict=True)]
    with pytest.raises(ValueError, match=message):
        run(policy_folder, reference_folder, SelectiveDPOConfig(**settings(tmp_path, **options)), rows)


def test_a_ratio_for_each_side_a_threshold_and_a_supervised_term(
    policy_folder: Path, reference_folder: Path, tmp_path: Path
) -> None:
    def first(**options: Any) -> dict[str, float]:
        return run(policy_folder, reference_folder, SelectiveDPOConfig(**settings(tmp_path, **options)))[0]

    sides = first(selection_ratio=[0.6, 0.1], selection_warmup_steps=4)
    assert (sides["selection/ratio/chosen"], sides["selection/ratio/rejected"]) == (1.0, 1.0)
    sides = first(selection_ratio=[0.6, 0.1])
    assert (sides["selection/ratio/chosen"], sides["selection/ratio/rejected"]) == pytest.approx((0.6, 0.1))
    threshold = first(selection_ratio=1.0, min_score=0.0)
    assert 0 < threshold["selection/fraction"] < 1
    plain, supervised = first(), first(sft_weight=0.5)
    more = first(sft_weight=1.0)["loss"] - plain["loss"]
    assert more > 0.1
    assert supervised["loss"] - plain["loss"] == pytest.approx(more / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sigmod"}, r"loss_type must be one of .*; got 'sigmod': did you mean 'sigmoid'\?"),
        ({"loss_type": ["sigmoid", "kto"]}, "loss_type must be one of .*; got 'kto'$"),
        ({"loss_type": []}, "loss_type must be a list of at least one name"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, -1.0]}, "weight of a term must be a finite number"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [0.0, 0.0]}, "every one of loss_weights is 0"),
        ({"loss_type": "exo_pair"}, "label_smoothing of exo_pair must be above 0"),
        ({"f_divergence_type": "kl"}, "f_divergence_type must be one of"),
        ({"loss_type": "nca_pair", "f_divergence_type": "forward_kl"}, "in which log Z cancels .*; not for nca_pair"),
        ({"ld_alpha": 1.5}, r"ld_alpha must be in \[0, 1\], or None; got 1.5"),
        ({"loss_type": "aot_unpaired", "use_weighting": True}, "pairs cannot be weighted .* under aot_unpaired"),
        ({"min_score": float("nan")}, "min_score"),
        ({"selection_ratio": [0.4, 0.1], "selection_pool": "pair"}, "two selection ratios need pool='response'"),
        ({"selection_ratio": [0.4, 0.1, 0.2]}, "a number or a pair of numbers"),
        ({"sft_weight": -1.0}, "weight of a term must be a finite number"),
    ],
)
def test_options_of_a_loss_that_mean_nothing(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectiveDPOConfig(**settings(tmp_path, **options))


def test_a_number_that_no_loss_reads_is_accepted_as_by_the_stock_trainer_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        SelectiveDPOConfig(**settings(tmp_path, loss_type="hinge", label_smoothing=0.1, discopop_tau=0.1))
    assert "label_smoothing=0.1 is not read by loss_type hinge" in caplog.text
    assert "discopop_tau=0.1 is not read by loss_type hinge" in caplog.text


def test_arguments_may_be_given_by_position(policy_folder: Path, reference_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    args = SelectiveDPOConfig(**settings(tmp_path))
    rows = Dataset.from_list(ROWS)
    trainer = SelectiveDPOTrainer(
        str(policy_folder), load(reference_folder), args, None, rows, rows, tokenizer, None, [], (optimizer, None)
    )
    assert trainer.optimizer is optimizer
    trainer.create_model_card()
    card = Path(args.output_dir, "README.md").read_text()
    assert "trained with Selective-DPO" in card
    assert "Not All Preferences are What You Need" in card
    assert "Zhijin Dong" in card


def test_4_bit_weights_learn_on_a_cpu_after_an_evaluation_too(reference_folder: Path, tmp_path: Path) -> None:
    """There the stock trainer's gradient is 0, on a CPU for which bitsandbytes packs weights at an evaluation."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder = make_model(tmp_path / "wide", seed=1, hidden_size=64, intermediate_size=64)
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)

    def first(kind: Any, args: Any) -> tuple[list[dict[str, float]], Any]:
        torch.manual_seed(0)
        trainer = kind(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=bits),
            args=args,
            train_dataset=Dataset.from_list(ROWS),
            eval_dataset=Dataset.from_list(ROWS[:4]),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
        )
        return steps(trainer), trainer

    theirs, _ = first(DPOTrainer, DPOConfig(**settings(tmp_path)))
    args = {"selection_ratio": 1.0, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    ours, trainer = first(SelectiveDPOTrainer, SelectiveDPOConfig(**settings(tmp_path, **args)))
    for expected, got in zip(theirs, ours, strict=True):
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2) != 0
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    layer = next(module for module in trainer.model.modules() if hasattr(module, "support_avx512bf16_for_cpu"))
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"4-bit weights \(.* for one\) are packed for inference, from where no grad"):
        keep_trainable_in_4_bits(trainer.model)


def test_text_rows_on_a_model_that_also_reads_images(tmp_path: Path, reference_folder: Path) -> None:
    folder = make_text_and_image_model(tmp_path / "seeing", seed=1)
    unused = {"ddp_find_unused_parameters": True}  # the part that reads images, where a process group is there
    args = SelectiveDPOConfig(**settings(tmp_path, selection_ratio=0.4, **unused))
    assert all(line["grad_norm"] > 0 for line in run(folder, reference_folder, args))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Policy and reference that read images."""
    pytest.importorskip("PIL", reason="pillow is not installed")
    folder = tmp_path_factory.mktemp("seeing")
    return make_model_with_processor(folder / "policy", seed=1), make_model_with_processor(folder / "ref", seed=2)


UNUSED = {"ddp_find_unused_parameters": True}
"""Rows of text leave the part that sees without a gradient. An earlier test may have left a process group behind, in
which this is data parallel then."""


def looked_at(folders: tuple[Path, Path], args: Any, rows: list[Any]) -> list[dict[str, float]]:
    policy, reference = (
        LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32) for folder in folders
    )
    return steps(
        (SelectiveDPOTrainer if isinstance(args, SelectiveDPOConfig) else DPOTrainer)(
            model=policy,
            ref_model=reference,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoProcessor.from_pretrained(folders[0]),
        )
    )


def test_images_reach_policy_and_reference(seeing: tuple[Path, Path], tmp_path: Path) -> None:
    """At ratio 1 the steps are the stock trainer's; other pictures make another loss, below ratio 1, too."""
    from PIL import Image

    def drawn(colour: str) -> list[Any]:
        turns = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        return [
            {
                "images": [Image.linear_gradient("L").convert("RGB") if n % 2 else Image.new("RGB", (40, 30), colour)],
                **{side: [{"role": role, "content": row[side].strip()}] for side, role in turns.items()},
            }
            for n, row in enumerate(ROWS[:4])
        ]

    theirs = looked_at(seeing, DPOConfig(**settings(tmp_path, **UNUSED)), drawn("red"))
    ours = looked_at(seeing, SelectiveDPOConfig(**settings(tmp_path, **UNUSED, selection_ratio=1.0)), drawn("red"))
    for expected, got in zip(theirs, ours, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "num_tokens"):
            assert got[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    args = SelectiveDPOConfig(**settings(tmp_path, **UNUSED, selection_ratio=0.4, max_steps=1))
    red, blue = looked_at(seeing, args, drawn("red"))[0], looked_at(seeing, args, drawn("blue"))[0]
    assert 0.4 <= red["selection/fraction"] < 1
    assert red["loss"] != pytest.approx(blue["loss"], rel=1e-4)


def test_text_rows_of_a_model_with_a_processor_have_stored_log_probs(seeing: tuple[Path, Path], tmp_path: Path) -> None:
    beside = looked_at(seeing, SelectiveDPOConfig(**settings(tmp_path, **UNUSED, selection_ratio=0.4)), ROWS)
    store = {"reference_store": str(tmp_path / "store"), "precompute_ref_log_probs": True}
    stored = looked_at(seeing, SelectiveDPOConfig(**settings(tmp_path, **UNUSED, selection_ratio=0.4, **store)), ROWS)
    for expected, got in zip(beside, stored, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert got["grad_norm"] > 0
