"""Where the tests of the gpu tier run: on a CUDA device, and in the slow tier on the CPU, too, so that
they are known to work before a device sees them.
"""

from __future__ import annotations

import pytest
import torch

__all__ = ["DEVICES"]

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
