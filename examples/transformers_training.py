"""Train a ResNet of Hugging Face transformers, eager and fused side by side; then save it and load it again.

    python examples/transformers_training.py --steps 3

``save_pretrained`` writes what the unfused model would: the file knows nothing of resnet_fast.
"""

from __future__ import annotations

import argparse
import copy
import tempfile

import torch
from transformers import ResNetConfig, ResNetForImageClassification

import resnet_fast


def train(model: ResNetForImageClassification, steps: int, batch: int, size: int) -> list[float]:
    """Losses of a few steps of AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        pixels = torch.randn(batch, 3, size, size, generator=generator).to(memory_format=torch.channels_last)
        labels = torch.randint(10, (batch,), generator=generator)
        out = model(pixel_values=pixels.to(model.device), labels=labels.to(model.device))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    return losses


def main() -> None:
    """Two copies of one network, the same data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    args = parser.parse_args()

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
    )
    eager = ResNetForImageClassification(config).to("cuda" if torch.cuda.is_available() else "cpu")
    fused = resnet_fast.fuse(copy.deepcopy(eager))
    print(str(resnet_fast.explain(fused)).splitlines()[0])

    losses = [train(model, args.steps, args.batch, args.size) for model in (eager, fused)]
    for i, (one, other) in enumerate(zip(*losses, strict=True), 1):
        print(f"step {i}: eager {one:.5f}, fused {other:.5f}")
    if any(abs(one - other) > 1e-2 * max(1.0, abs(one)) for one, other in zip(*losses, strict=True)):
        raise SystemExit("the losses differ")

    with tempfile.TemporaryDirectory() as folder:
        fused.save_pretrained(folder)
        loaded = ResNetForImageClassification.from_pretrained(folder)
    resnet_fast.fuse(loaded.eval())
    with torch.inference_mode():
        x = torch.randn(2, 3, args.size, args.size)
        error = (loaded(x).logits - fused.cpu().eval()(x).logits).abs().max().item()
    print(f"the losses agree; saved and loaded: largest difference {error:.1e}")
    if not error < 1e-3:
        raise SystemExit("the loaded model differs")


if __name__ == "__main__":
    main()
