"""Whether two tokenizers mean the same by every id."""

from __future__ import annotations

from typing import Any


def check_same_tokenizer(policy: Any, reference: Any) -> None:
    """Raises unless both tokenizers give every token string the same id; names the first that differs.

    Vocabularies are compared token by token, not by size: a padded or larger vocabulary of the reference is fine.

    Raises:
        ValueError: an id of the policy's vocabulary means something else to the reference.
    """
    difference = differing_token(policy.get_vocab(), reference.get_vocab())
    if difference is not None:
        raise ValueError(
            f"policy and reference tokenize differently: {difference}. Per-token log-probs of different tokens cannot "
            "be compared: choose a reference that shares the policy's tokenizer"
        )


def differing_token(policy: dict[str, int], reference: dict[str, int]) -> str | None:
    """The first token, in order of the policy's ids, that has another id in the reference's vocabulary; None if none.

    Args:
        policy, reference: token → id. What only the reference has does not matter.
    """
    by_id = {token_id: token for token, token_id in reference.items()}
    for token, token_id in sorted(policy.items(), key=lambda item: item[1]):
        if reference.get(token) != token_id:
            other = by_id.get(token_id)
            said = "no token" if other is None else repr(other)
            return f"id {token_id} is {token!r} for the policy and {said} for the reference"
    return None
