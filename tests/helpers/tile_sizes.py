"""Other tile sizes of the Triton kernels, so that small tensors take many tiles under the interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest

from balcaprl.kernels.support import launch


@contextlib.contextmanager
def overridden(kernel: str, **blocks: int) -> Iterator[None]:
    """Replaces tile sizes in all rows of a kernel's launch table within the context."""
    rows = {key: replace(row, blocks={**row.blocks, **blocks}) for key, row in launch.TABLES[kernel].items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(launch.TABLES, kernel, rows)
        yield
