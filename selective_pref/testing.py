"""The laws of DPO and of Selective-DPO, run on anybody's function.

In: a loss of pairs of responses, yours or a library's. Out: nothing where it keeps every law; else an AssertionError
that names each law that it breaks, with a small counterexample. The examples are the same in every run.

    >>> from selective_pref import dpo_loss
    >>> assert_conforms(dpo_loss)
    >>> def upside_down(chosen, rejected, *, beta):
    ...     return dpo_loss(rejected, chosen, beta=beta)
    >>> sorted(broken_laws(upside_down))
    ['direction', 'every token', 'value']

Needs NumPy, and the library of your arrays; import it by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from selective_pref._arrays import Array
from selective_pref._laws import LAWS
from selective_pref._subject import Subject, WrongKindError

__all__ = ["assert_conforms", "broken_laws"]


def assert_conforms(
    loss: Callable[..., Any],
    *,
    selective: bool = False,
    as_array: Callable[[Any], Array] = np.asarray,
) -> None:
    """Raises AssertionError unless `loss` keeps every law of DPO, or of Selective-DPO.

    Args:
        loss: (chosen, rejected, *, beta) → losses [B], their mean, or a `PreferenceLoss`; with `selective` it takes
            `selection_ratio` as well. The two responses have the fields of `Response`.
        selective: whether it is Selective-DPO (Eq. 6 to 8, pool "response") and not DPO.
        as_array: NumPy array (float64, or bool for masks) → what the loss takes: `torch.from_numpy`,
            `jax.numpy.asarray`.
            With torch and JAX gradients are looked at, too. The tolerance is that of the floats it makes.

    Raises:
        AssertionError: laws are broken; the message has a line for each, with a counterexample.
        TypeError: `loss` cannot be called so, or returns no such losses; the message says what is wanted.
    """
    broken = broken_laws(loss, selective=selective, as_array=as_array)
    if broken:
        name = getattr(loss, "__name__", type(loss).__name__)
        lines = [f"- {law}: {LAWS[law][0]}. {said}" for law, said in broken.items() if not said.startswith(_RAISES)]
        for said in dict.fromkeys(said for said in broken.values() if said.startswith(_RAISES)):
            lines.append(f"- {', '.join(law for law in broken if broken[law] == said)}: {said}")
            if as_array is np.asarray:
                lines.append("  It was given NumPy arrays. For others say as_array, such as as_array=torch.from_numpy")
        raise AssertionError("\n".join([f"{name} breaks {len(broken)} of {len(LAWS)} laws:", *lines]))


_RAISES = "It raises"


def broken_laws(
    loss: Callable[..., Any],
    *,
    selective: bool = False,
    as_array: Callable[[Any], Array] = np.asarray,
) -> dict[str, str]:
    """The laws that a loss breaks → a counterexample of each, as text; empty where it keeps all.

    Args, Raises: as `assert_conforms`, without the AssertionError.

    Returns:
        Names of laws, as `LAWS` has them, in its order.
    """
    subject = Subject(loss, selective, as_array)
    found: dict[str, str] = {}
    for law, (_, examples) in LAWS.items():
        try:
            with np.errstate(all="ignore"):
                example = next(examples(subject), None)
        except WrongKindError:
            raise
        except Exception as error:
            example = f"{_RAISES} {type(error).__name__}: {error}"
        if example is not None:
            found[law] = example
    return found
