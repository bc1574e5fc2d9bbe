"""Marks of tests that need kernels which may not be there: they skip, and say why."""

from __future__ import annotations

import pytest
import torch

from resnet_fast.dispatch import reasons
from tests import cuda_on_cpu

#: Why ops run without resnet_fast._C on the CPU, or None.
why_no_native = reasons("bn_stats", torch.device("cpu"), torch.float32)["native"]
needs_native = pytest.mark.skipif(why_no_native is not None, reason=f"native: {why_no_native}")

#: The CUDA kernels, run by cuda_on_cpu.
needs_machine = pytest.mark.skipif(
    cuda_on_cpu.why_not() is not None, reason=f"cuda_on_cpu: {cuda_on_cpu.why_not() or ''}"
)
