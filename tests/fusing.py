"""How whole models are compared: the original, the fused one, and the original in float64 as the judge.

Outputs and running statistics obey the house's rule, max|ours - ref64| <= 2 max|torch - ref64| + 4 eps max|ref64|,
with torch's error the larger one of its NCHW and channels-last runs: one run of a whole network is a single draw of
its rounding errors. Gradients of a whole network do not obey any rule element by element: where rounding moves one
activation across 0, torch's own gradient jumps by a finite amount too. They are judged by their relative L2 error over
the network, beside torch's; the rule per element holds them per block (test_functional.py, test_modules.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast import models
from resnet_fast.plan import ConvBnPath, NormAct, find


def calibrated(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms as after training: no gamma at 1, no beta at 0, running statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if "BatchNorm" in type(m).__name__:
            with torch.no_grad():
                m.weight.uniform_(0.5, 1.5, generator=generator)
                m.bias.normal_(0, 0.2, generator=generator)
                m.running_mean.normal_(0, 0.1, generator=generator)
                m.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


#: What the small network of the tests of fuse() gets.
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    """A calibrated CIFAR ResNet-20, in eval."""
    torch.manual_seed(0)
    return calibrated(models.cifar_resnet20()).eval()


def statuses(model: nn.Module) -> set[str]:
    """Which statuses occur in explain()."""
    return {row.status for row in resnet_fast.explain(model)}


def run(model: nn.Module, x: Tensor = X) -> Tensor:
    """The model's output, without gradients."""
    with torch.no_grad():
        return model(x)


def first_tensor(out: object) -> Tensor:
    """The tensor that matters in a model's output."""
    if isinstance(out, Tensor):
        return out
    if hasattr(out, "logits"):
        return out.logits
    if hasattr(out, "feature_maps"):
        return out.feature_maps[-1]
    if isinstance(out, dict):
        return out["out"] if "out" in out else next(iter(out.values()))
    return out[-1]


def measure(model: nn.Module, x: Tensor, train: bool) -> dict[str, dict[str, Tensor]]:
    """Eval output; then, with ``train``, one training step's output, gradients and buffers."""
    model.eval()
    with torch.no_grad():
        evaluated = first_tensor(model(x))
    if not train:
        return {"eval": {"out": evaluated}, "train": {}, "buffers": {}}
    model.train()
    model.zero_grad()
    torch.manual_seed(1)  # drop-out, where there is some
    out = first_tensor(model(x))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (out * weight.to(out.dtype)).sum().backward()
    return {
        "eval": {"out": evaluated},
        "train": {"out": out.detach()},
        "grads": {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
    }


def _check(name: str, ours: Tensor, plain: list[Tensor], ref: Tensor, dtype: torch.dtype) -> None:
    error, *own = ((t.double() - ref).abs().max().item() for t in (ours, *plain))
    theirs = max(own)
    allowed = 2 * theirs + 4 * torch.finfo(dtype).eps * ref.abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3g}, torch's own {theirs:.3g}, allowed {allowed:.3g}"


def _relative(grads: dict[str, Tensor], ref: dict[str, Tensor]) -> float:
    error = sum((grads[n].double() - ref[n]).square().sum().item() for n in ref)
    return (error / sum(r.square().sum().item() for r in ref.values())) ** 0.5


def assert_same_model(
    make: Callable[[], nn.Module],
    x: Tensor,
    *,
    fused: int | None = None,
    dtype: torch.dtype = torch.float32,
    train: bool = True,
    generic: bool = False,
) -> resnet_fast.fuse.Explanation:
    """The fused model against the original; ``fused``: how many rows of explain() must say so."""
    return compare(make, x, fused=fused, dtype=dtype, train=train, generic=generic)[1]


def compare(
    make: Callable[[], nn.Module],
    x: Tensor,
    *,
    fused: int | None = None,
    dtype: torch.dtype = torch.float32,
    train: bool = True,
    generic: bool = False,
) -> tuple[nn.Module, resnet_fast.fuse.Explanation]:
    """``assert_same_model``; the fused model beside the rows."""
    torch.manual_seed(0)
    plain = calibrated(make())
    judge = copy.deepcopy(plain).double()
    plain.to(dtype)
    plain_cl = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    ours = resnet_fast.fuse(copy.deepcopy(plain), generic=generic)
    four = (ours, plain, plain_cl, judge)
    mine, *theirs, ref = (measure(m, x.to(torch.float64 if m is judge else dtype), train) for m in four)
    for kind in ("eval", "train", "buffers"):
        for name, value in ref[kind].items():
            if value.is_floating_point():
                _check(f"{kind} {name}", mine[kind][name], [t[kind][name] for t in theirs], value, dtype)
            else:
                assert torch.equal(mine[kind][name], value), name
    if train:
        assert mine["grads"].keys() == theirs[0]["grads"].keys(), "which parameters got a gradient"
        error, *own = (_relative(m["grads"], ref["grads"]) for m in (mine, *theirs))
        allowed = 2 * max(own) + (2e-2 if dtype == torch.float32 else 1e-1)
        assert error <= allowed, f"gradients: relative L2 error {error:.3g}, torch's own {max(own):.3g}"
    rows = resnet_fast.explain(ours)
    if fused is not None:
        assert sum(row.status == "fused" for row in rows) == fused, f"\n{rows}"
    return ours, rows


def norms(model: nn.Module) -> tuple[int, int]:
    """How many batch norms of a fused model run in fused parts, unless the last call fell back, and how many it has."""
    inside: set[int] = set()
    for m in model.modules():
        state = m.__dict__.get("_resnet_fast")
        if state is None or state.refusal is not None:
            continue
        for part in getattr(state.plan, "parts", (state.plan,)):
            layers = [part, *getattr(part, "layers", ()), getattr(part, "shortcut", None)]
            inside |= {id(find(m, layer.bn)) for layer in layers if isinstance(layer, (ConvBnPath, NormAct))}
    every = {id(m) for m in model.modules() if "BatchNorm" in type(m).__name__}
    return len(inside & every), len(every)
