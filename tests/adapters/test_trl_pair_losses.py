"""Every loss that TRL names, against TRL's own trainer on the same log-probs: value and gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from selective_pref import (
    PreferenceLoss,
    Response,
    aot_loss,
    combine_losses,
    divergences,
    mean_log_ratio,
    pair_losses,
    preference_loss,
    summed_log_ratio,
    token_sft_loss,
    weigh_pairs,
)
from tiny import text_rows

BETA, SMOOTHING, ALPHA = 0.5, 0.1, 0.5
Objective = Callable[[Response, Response], PreferenceLoss]


def of(pair_loss: Callable, reward: Callable = summed_log_ratio, **numbers: float) -> Objective:
    return partial(preference_loss, pair_loss=partial(pair_loss, **numbers), beta=BETA, reward=reward)


OURS: dict[str, Objective] = {
    "sigmoid": of(pair_losses.sigmoid),
    "hinge": of(pair_losses.hinge),
    "ipo": of(pair_losses.ipo, mean_log_ratio),
    "exo_pair": of(pair_losses.exo_pair, label_smoothing=SMOOTHING),
    "nca_pair": of(pair_losses.nca_pair),
    "robust": of(pair_losses.robust, label_smoothing=SMOOTHING),
    "bco_pair": of(pair_losses.bco_pair),
    "sppo_hard": of(pair_losses.sppo_hard),
    "aot": partial(aot_loss, beta=BETA, label_smoothing=SMOOTHING),
    "aot_unpaired": of(pair_losses.aot_unpaired, label_smoothing=SMOOTHING),
    "apo_zero": of(pair_losses.apo_zero),
    "apo_down": of(pair_losses.apo_down),
    "discopop": of(pair_losses.discopop),
    "sft": token_sft_loss,
    "sigmoid_norm": of(pair_losses.sigmoid, mean_log_ratio),
}
DIVERGENCES = {
    "reverse_kl": divergences.reverse_kl,
    "forward_kl": divergences.forward_kl,
    "js_divergence": divergences.js_divergence,
    "alpha_divergence": partial(divergences.alpha_divergence, alpha=ALPHA),
}


class Recording(nn.Module):
    """A model that keeps the log-probs of its last call, with their gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        self.log_probs = outputs.log_probs
        if self.log_probs.requires_grad:
            self.log_probs.retain_grad()
        return outputs


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory, policy_folder: Path, reference_folder: Path) -> Any:
    from trl import DPOConfig, DPOTrainer

    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (policy_folder, reference_folder)
    )
    args = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("stock")),
        use_cpu=True,
        bf16=False,
        report_to=[],
        beta=BETA,
        label_smoothing=SMOOTHING,
        f_alpha_divergence_coef=ALPHA,
        per_device_train_batch_size=6,
        gradient_checkpointing=False,
    )
    made = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(text_rows(12)),
        processing_class=AutoTokenizer.from_pretrained(policy_folder),
    )
    made.ref_model = Recording(made.ref_model)
    return made


def compare(trainer: Any, ours: Objective, **stock: Any) -> None:
    """TRL's loss of a batch, and its gradient at the log-probs, beside ours of the same log-probs."""
    before = {name: getattr(trainer, name) for name in stock}
    policy = Recording(trainer.model)
    inputs = next(iter(trainer.get_train_dataloader()))
    try:
        for name, value in stock.items():
            setattr(trainer, name, value)
        expected = trainer.compute_loss(policy, dict(inputs))
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)
    expected.backward()
    leaf = policy.log_probs.detach().requires_grad_()
    mask = inputs["completion_mask"][:, 1:].bool()
    sides = Response.from_stacked(per_token_logps=leaf, mask=mask, ref_per_token_logps=trainer.ref_model.log_probs)
    loss = ours(*sides).loss
    loss.backward()
    assert len(set(mask.sum(-1).tolist())) > 1
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(leaf.grad, torch.where(mask, policy.log_probs.grad, 0.0), rtol=2e-4, atol=2e-6)


def test_the_list_is_trls_own(trainer: Any) -> None:
    words = type(trainer.args).__dataclass_fields__["loss_type"].metadata["help"]
    named = {word.strip("`'., ") for word in words.split("Possible values are:")[1].split(". If")[0].split(",")}
    assert named == set(OURS)


@pytest.mark.parametrize("name", OURS)
def test_each_loss_is_trls_in_value_and_gradient(trainer: Any, name: str) -> None:
    compare(trainer, OURS[name], loss_types=[name], loss_weights=[1.0])


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_each_divergence_is_trls_in_value_and_gradient(trainer: Any, divergence: str, name: str) -> None:
    rule = mean_log_ratio if name == "ipo" else summed_log_ratio
    reward = partial(rule, divergence=DIVERGENCES[divergence])
    ours = of(getattr(pair_losses, name), reward)
    compare(trainer, ours, loss_types=[name], loss_weights=[1.0], f_divergence_type=divergence)


def test_sums_of_losses_are_trls(trainer: Any) -> None:
    names, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]

    def mpo(chosen: Response, rejected: Response) -> PreferenceLoss:
        return combine_losses(*((w, OURS[name](chosen, rejected)) for w, name in zip(weights, names, strict=True)))

    compare(trainer, mpo, loss_types=names, loss_weights=weights)


def test_a_weight_for_each_pair_over_their_number_is_a_mean_of_weighted_losses() -> None:
    """What TRL does with WPO's weights: it multiplies and takes the plain mean."""
    leaf = torch.zeros(4, 3, requires_grad=True)
    ref = -torch.arange(12.0).reshape(4, 3) / 10
    pair = Response.from_stacked(per_token_logps=leaf, mask=torch.ones(4, 3) > 0, ref_per_token_logps=ref)
    out, weights = OURS["sigmoid"](*pair), torch.tensor([0.2, 0.7])
    torch.testing.assert_close(weigh_pairs(out, weights, total=2).loss, (out.losses * weights).mean())
