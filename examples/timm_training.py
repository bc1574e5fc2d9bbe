"""Train a timm ResNet with timm's own tools: optimizer, schedule, mixup, stochastic depth, a moving average.

    python examples/timm_training.py --steps 3

The moving average is a deep copy of the fused model, and so is fused itself; it is evaluated at the end.
"""

from __future__ import annotations

import argparse

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import resnet_fast


def main() -> None:
    """A short run on synthetic images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="any ResNet of timm: resnet50d, seresnet50, ...")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=10, drop_path_rate=0.05)
    model = model.to(device, memory_format=torch.channels_last).train()
    resnet_fast.fuse(model)
    print(str(resnet_fast.explain(model)).splitlines()[0])

    optimizer = create_optimizer_v2(model, opt="lamb", lr=2e-3, weight_decay=0.02)
    schedule = CosineLRScheduler(optimizer, t_initial=args.steps, warmup_t=1, warmup_lr_init=1e-4)
    average = ModelEmaV3(model, decay=0.9)
    mixup = Mixup(mixup_alpha=0.1, cutmix_alpha=1.0, num_classes=10)
    criterion = SoftTargetCrossEntropy()

    for step in range(1, args.steps + 1):
        x = torch.randn(args.batch, 3, args.size, args.size, device=device)
        x, y = mixup(x, torch.randint(10, (args.batch,), device=device))
        x = x.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step(step)
        average.update(model, step=step)
        print(f"step {step}: loss {loss.item():.4f}")

    average.eval()
    with torch.inference_mode():
        x = torch.randn(args.batch, 3, args.size, args.size, device=device).to(memory_format=torch.channels_last)
        ours = average(x)
        theirs = resnet_fast.unfuse(average)(x)
    error = (ours - theirs).abs().max().item()
    print(f"the average, fused and unfused: largest difference {error:.1e}")
    if not error < 1e-2:
        raise SystemExit("they differ")


if __name__ == "__main__":
    main()
