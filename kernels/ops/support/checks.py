"""Argument checks that the ops share. Each check raises ValueError with a message that starts with the argument's name.

These checks never read a tensor's values, so that ``torch.compile`` can trace them. Each op checks values in its body.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensor(
    name: str,
    value: object,
    *,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> None:
    """Checks shape, dtype and device of a tensor argument.

    Args:
        name: the argument's name.
        value: what the caller passed.
        shape: the size of each dimension; a string allows any size and names the dimension in the message.
        dtypes: the allowed dtypes; None allows every real floating type.
        device: the device that the tensor must be on; None allows any.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    fits = value.dim() == len(shape) and all(isinstance(n, str) or value.shape[i] == n for i, n in enumerate(shape))
    if not fits:
        expected = ", ".join(str(n) for n in shape) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(value.shape)}")
    if dtypes is None:
        if not value.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point dtype, got {value.dtype}")
    elif value.dtype not in dtypes:
        allowed = " or ".join(str(d) for d in dtypes)
        raise ValueError(f"{name}: expected dtype {allowed}, got {value.dtype}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {value.device}")


def check_impl(op: str, impl: str, impls: Sequence[str]) -> None:
    """Checks that ``impl`` is ``auto`` or one of the op's implementations."""
    if impl != "auto" and impl not in impls:
        names = ", ".join(repr(i) for i in ("auto", *impls))
        raise ValueError(f"impl: {op} has {names}; got {impl!r}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Checks a string argument against its possible values."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(repr(c) for c in choices)}; got {value!r}")


def check_number(name: str, value: object, *, low: float, high: float = math.inf, exclusive_low: bool = False) -> None:
    """Checks that ``value`` is a finite number with ``low <= value <= high`` (``low < value`` if ``exclusive_low``)."""
    if isinstance(value, bool | str) or value is None or isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a number, got {type(value).__name__}")
    number: float = value  # type: ignore[assignment]
    above = number > low if exclusive_low else number >= low
    if not (above and number <= high and number < math.inf):
        bounds = f"{'>' if exclusive_low else '>='} {low}" + (f" and <= {high}" if high < math.inf else "")
        raise ValueError(f"{name}: expected a finite number {bounds}, got {value!r}")
