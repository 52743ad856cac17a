"""Batch → Responses, with the model's own log-probs computed the long way round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selective_pref import dpo_loss, selective_dpo_loss
from selective_pref_adapters.batch import labels_of, responses
from selective_pref_adapters.heads import model_per_token_logps
from selective_pref_adapters.pairs import PreferenceRow, TokenizedPair, collate, tokenize_pairs
from tiny import text_rows


@pytest.fixture(scope="module")
def model(policy_folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(policy_folder).eval()


def some_pairs(folder: Path, count: int = 6) -> list[TokenizedPair]:
    rows = [PreferenceRow(**row, place="x") for row in text_rows(count)]
    return tokenize_pairs(rows, AutoTokenizer.from_pretrained(folder), max_length=64)[0]


def test_collate_by_hand() -> None:
    pair = TokenizedPair(chosen_ids=[5, 6, 7], rejected_ids=[5, 8], chosen_prompt_length=1, rejected_prompt_length=1)
    batch = collate([pair], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["completion_mask"].tolist() == [[0, 1, 1], [0, 1, 0]]
    assert labels_of(batch).tolist() == [[-100, 6, 7], [-100, 8, -100]]
    chosen, rejected = responses(batch, torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]))
    assert chosen.mask.tolist() == [[True, True]]
    assert rejected.mask.tolist() == [[True, False]]


def test_batch_log_probs_equal_those_of_each_sequence_alone(model: torch.nn.Module, policy_folder: Path) -> None:
    """Catches a shift off by one, prompt tokens that count, padding that leaks, a missing EOS."""
    pairs = some_pairs(policy_folder)
    batch = collate(pairs, pad_token_id=0)
    with torch.no_grad():
        chosen, rejected = responses(batch, model_per_token_logps(model, batch))
        for side, response, ids_of, prompt_of in (
            ("chosen", chosen, lambda p: p.chosen_ids, lambda p: p.chosen_prompt_length),
            ("rejected", rejected, lambda p: p.rejected_ids, lambda p: p.rejected_prompt_length),
        ):
            for row, pair in enumerate(pairs):
                ids, prompt = ids_of(pair), prompt_of(pair)
                distributions = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
                expected = [float(distributions[t - 1, ids[t]]) for t in range(prompt, len(ids))]
                got = response.per_token_logps[row][response.mask[row]].tolist()
                assert got == pytest.approx(expected, abs=1e-5), (side, row)


@pytest.mark.slow
def test_ratio_one_equals_trls_sigmoid_loss(
    model: torch.nn.Module, policy_folder: Path, reference_folder: Path, tmp_path: Path
) -> None:
    """TRL's own trainer on the same batch: loss to float32 rounding, and the gradient with it."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy = AutoModelForCausalLM.from_pretrained(policy_folder)
    reference = AutoModelForCausalLM.from_pretrained(reference_folder).eval()
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, beta=0.3, report_to="none"),
        train_dataset=Dataset.from_list(text_rows(6)),
        processing_class=AutoTokenizer.from_pretrained(policy_folder),
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    trainer.model.train()
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()
    expected = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()

    batch = collate(some_pairs(policy_folder), pad_token_id=0)
    with torch.no_grad():
        ref_logps = model_per_token_logps(reference, batch)
    sides = responses(batch, model_per_token_logps(policy, batch), ref_logps)
    ours = dpo_loss(*sides, beta=0.3).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=2e-6)
    assert selective_dpo_loss(*sides, beta=0.3, selection_ratio=1).loss.equal(ours)
    ours.backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
