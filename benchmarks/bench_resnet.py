"""ResNet-50 from end to end at 224 x 224, small batches: inference and training, ours against torch.

``pytest --benchmark benchmarks/bench_resnet.py``. ``resnet-fast bench`` times the same contenders in turns
and checks first that the numbers are equal; its ratios are the ones to quote. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.rounds import run_rounds
from resnet_fast import models
from resnet_fast.commands.engines import ENGINES
from resnet_fast.commands.timing import AGAINST, Setting, contenders

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
#: mode, dtype -> batch on a CPU and on a GPU.
SETTINGS = {
    ("inference", torch.float32): {"cpu": 2, "cuda": 128},
    ("inference", torch.bfloat16): {"cpu": 2, "cuda": 128},
    ("training", torch.float32): {"cpu": 2, "cuda": 64},
    ("training", torch.bfloat16): {"cpu": 2, "cuda": 64},
}


@pytest.mark.parametrize("contender", ("resnet_fast", *AGAINST))
@pytest.mark.parametrize(("mode", "dtype"), SETTINGS, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize("device", DEVICES)
def bench_resnet50(benchmark: Any, device: str, mode: str, dtype: torch.dtype, contender: str) -> None:
    if (device, mode, contender) == ("cpu", "training", "compile"):
        pytest.skip("compiling the backward takes minutes on a CPU; resnet-fast bench --mode training has it")
    if contender in ENGINES:
        if (device, mode) != ("cpu", "inference"):
            pytest.skip(f"{contender}: supported is inference on a CPU")
        pytest.importorskip(contender)
    torch._dynamo.reset()
    setting = Setting(mode, SETTINGS[mode, dtype][device], 224, dtype, torch.device(device))
    torch.manual_seed(0)
    x = torch.randn(setting.batch, 3, setting.size, setting.size)
    against = [] if contender == "resnet_fast" else [contender]
    chosen = next(c for c in contenders(models.resnet50(), x, setting, against) if c.name == contender)
    benchmark.group = f"resnet50 {mode} {setting.dtype_name} {device} batch {setting.batch}"
    rounds = run_rounds(chosen.call, device, seconds=2, benchmark=benchmark, inference=mode == "inference")
    benchmark.extra_info.update(p20=rounds.p20, p50=rounds.p50, p80=rounds.p80, **{"img/s": setting.batch / rounds.p50})
