"""What our own convolutions on a CPU (winograd.py, pointwise.py, direct.py) share: ``_C``, and where they run."""

from __future__ import annotations

import torch

from resnet_fast import switches

try:
    from resnet_fast import _C as _C
except ImportError:  # built without it: unable says so
    _C = None  # type: ignore[assignment]

CHANNELS_LAST = torch.channels_last

#: What the kernels call the dtypes that they store.
DTYPES: dict[torch.dtype, _C.DType] = (
    {}
    if _C is None
    else {
        torch.float32: _C.DType.float32,
        torch.bfloat16: _C.DType.bfloat16,
        torch.float16: _C.DType.float16,
    }
)


#: Multiply-adds of a unit of work that a thread has done before the library's threads are awake.
_SMALL = 5e6


def too_few(units: int, macs: int) -> str | None:
    """Why ``units`` of work with ``macs`` multiply-adds together are not enough for torch's threads, or None."""
    threads = torch.get_num_threads()
    return f"{units} units of work for {threads} threads" if units < threads and macs > units * _SMALL else None


def unable(device: torch.device, dtype: torch.dtype, switch: str) -> str | None:
    """Why no convolution that ``switch`` leaves out runs on ``device`` in ``dtype``, or None."""
    if device.type != "cpu" or _C is None:
        return "not on a CPU with resnet_fast._C"
    if not switches.on(switch):
        return "switched off"
    if dtype != torch.float32:
        return "not float32"
    return None
