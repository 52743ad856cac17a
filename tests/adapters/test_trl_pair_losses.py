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
    select,
    summed_log_ratio,
    token_sft_loss,
    weigh_pairs,
)
from selective_pref_adapters.objectives import loss_of_batch, make_objective, policy_weights
from selective_pref_adapters.objectives.named_losses import NamedLoss
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


def pair() -> tuple[Response, Response]:
    torch.manual_seed(0)
    policy, ref = -torch.rand(6, 8), -torch.rand(6, 8)
    mask = torch.arange(8) < torch.tensor([8, 5, 3, 6, 8, 1])[:, None]
    return Response.from_stacked(per_token_logps=policy, mask=mask, ref_per_token_logps=ref)


class Recording(nn.Module):
    """A model that keeps the log-probs of its last call, with their gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        if not hasattr(outputs, "log_probs"):
            pytest.skip("compares with TRL's fused head, which came with TRL 1.15")
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


def named(*names: str, **numbers: Any) -> NamedLoss:
    smoothing = 0.0 if names[0] in ("sigmoid", "sigmoid_norm") else SMOOTHING  # TRL's ignore it
    return NamedLoss(loss_type=names, beta=BETA, label_smoothing=smoothing, f_alpha_divergence_coef=ALPHA, **numbers)


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


@pytest.mark.parametrize("name", OURS)
def test_each_name_of_a_configuration_is_trls(trainer: Any, name: str) -> None:
    compare(trainer, named(name), loss_types=[name], loss_weights=[1.0])
    chosen, rejected = pair()
    ours = make_objective("selective_dpo", selection_ratio=1.0, beta=BETA, loss_type=name, label_smoothing=1e-3)
    plain = make_objective("dpo", beta=BETA, loss_type=name, label_smoothing=1e-3)
    assert torch.equal(ours(chosen, rejected).losses, plain(chosen, rejected).losses)


@pytest.mark.parametrize("name", OURS)
def test_each_name_reads_the_selected_tokens_and_reports_log_ratios(name: str) -> None:
    chosen, rejected = pair()
    ours = make_objective("selective_dpo", selection_ratio=(0.5, 0.25), loss_type=name, beta=BETA, label_smoothing=0.1)
    out = ours(chosen, rejected)
    selected = select(chosen, rejected, selection_ratio=(0.5, 0.25))
    assert torch.equal(
        out.losses, make_objective("dpo", loss_type=name, beta=BETA, label_smoothing=0.1)(*selected).losses
    )
    torch.testing.assert_close(out.chosen_rewards, BETA * summed_log_ratio(chosen))
    torch.testing.assert_close(out.rejected_selected_rewards, BETA * summed_log_ratio(selected[1]))


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "aot", "apo_zero"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_length_desensitisation_is_trls(trainer: Any, name: str, alpha: float) -> None:
    compare(trainer, named(name, ld_alpha=alpha), loss_types=[name], loss_weights=[1.0], ld_alpha=alpha)


def test_the_supervised_term_of_a_sum_reads_every_token_under_length_desensitisation(trainer: Any) -> None:
    ours = named("sigmoid", "sft", loss_weights=[1.0, 0.5], ld_alpha=0.3)
    compare(trainer, ours, loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.5], ld_alpha=0.3)


def test_sums_by_name_are_trls(trainer: Any) -> None:
    names, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]
    compare(trainer, named(*names, loss_weights=weights), loss_types=names, loss_weights=weights)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_by_name_are_trls(trainer: Any, divergence: str) -> None:
    ours = named("sigmoid_norm", f_divergence_type=divergence)
    compare(trainer, ours, loss_types=["sigmoid_norm"], loss_weights=[1.0], f_divergence_type=divergence)


def test_policy_weights_are_trls(trainer: Any) -> None:
    """TRL computes them inside its loss, from the statistics of its fused head."""
    policy, inputs = Recording(trainer.model), next(iter(trainer.get_train_dataloader()))
    mask = inputs["completion_mask"][:, 1:].bool()
    logits = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    squares = (logits.double().softmax(-1) ** 2).sum(-1).log()

    class WithSquares(nn.Module):
        def forward(self, **given: Any) -> Any:
            outputs = policy(**given)
            outputs.log_sum_sq_probs = squares.float()
            return outputs

    trainer.use_weighting = True
    try:
        expected = trainer.compute_loss(WithSquares(), dict(inputs))
    finally:
        trainer.use_weighting = False
    weights = policy_weights(policy.log_probs, squares, mask)
    assert 0.01 < weights.min() < weights.max()
    ours = loss_of_batch(
        make_objective("dpo", beta=BETA), inputs, policy.log_probs, trainer.ref_model.log_probs, pair_weights=weights
    )
    torch.testing.assert_close(ours.loss, expected, rtol=2e-5, atol=2e-6)
    assert not weights.requires_grad


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
