"""Train a torchvision ResNet, eager and fused side by side: the losses agree step by step.

    python examples/torchvision_training.py --steps 3

The only line that resnet_fast needs is ``resnet_fast.fuse(model)``. Synthetic images; runs anywhere.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
import torchvision
from torch import nn

import resnet_fast


def train(model: nn.Module, steps: int, batch: int, size: int, device: torch.device) -> list[float]:
    """Losses of ``steps`` steps of SGD with a cosine schedule, under autocast on a GPU."""
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        x = torch.randn(batch, 3, size, size, generator=generator).to(device, memory_format=torch.channels_last)
        y = torch.randint(10, (batch,), generator=generator).to(device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Two copies of one network, the same data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="any ResNet of torchvision.models")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    torch.manual_seed(0)
    eager = torchvision.models.get_model(args.model, num_classes=10)
    fused = resnet_fast.fuse(copy.deepcopy(eager))
    print(str(resnet_fast.explain(fused)).splitlines()[0])

    losses = []
    for name, model in (("eager", eager), ("fused", fused)):
        begin = time.perf_counter()
        losses.append(train(model, args.steps, args.batch, args.size, device))
        print(f"{name}: {(time.perf_counter() - begin) / args.steps:.3f} s a step")
    for i, (one, other) in enumerate(zip(*losses, strict=True), 1):
        print(f"step {i}: eager {one:.5f}, fused {other:.5f}")
    tolerance = 1e-2 if device.type == "cpu" else 5e-2  # rounding differs, and a few steps let it grow
    if any(abs(one - other) > tolerance * max(1.0, abs(one)) for one, other in zip(*losses, strict=True)):
        raise SystemExit("the losses differ")
    print("the losses agree")


if __name__ == "__main__":
    main()
