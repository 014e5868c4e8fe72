"""Memory that nobody has written, filled with what can be told from results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

NAN = 0xFF
"""A number all of whose bytes are this is NaN, in each floating-point type of results."""


@contextmanager
def unwritten_holds(byte: int) -> Iterator[None]:
    """What `torch.empty` and `torch.empty_like` make holds such bytes: outputs and scratch alike."""
    made: dict[str, Any] = {name: _filled(getattr(torch, name), byte) for name in ("empty", "empty_like")}
    with patch.multiple(torch, **made):
        yield


def _filled(make: Callable[..., Tensor], byte: int) -> Callable[..., Tensor]:
    def made(*arguments: object, **options: object) -> Tensor:
        tensor = make(*arguments, **options)
        if tensor.device.type != "meta" and tensor.numel():
            whole = torch.tensor([], dtype=torch.uint8, device=tensor.device)
            whole.set_(tensor.untyped_storage()).fill_(byte)
        return tensor

    return made
