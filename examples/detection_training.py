"""Train the first stage of a Faster R-CNN: a frozen-norm ResNet, a feature pyramid, a region proposal network.

    python examples/detection_training.py --steps 3

The backbone is torchvision's for detection: batch norms are FrozenBatchNorm2d, the first stages do not learn, and the
fused blocks fold the norms while the later stages' convolutions train. A whole ``FasterRCNN`` takes the same line,
``resnet_fast.fuse(model.backbone)``; its second stage needs torchvision's compiled operators, this script does not.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import FrozenBatchNorm2d

import resnet_fast


class Proposals(nn.Module):
    """Backbone, pyramid and region proposal network; returns the two losses of its training."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone = resnet_fpn_backbone(
            backbone_name=name, weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
        )
        anchors = AnchorGenerator(tuple((s,) for s in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5)
        head = RPNHead(self.backbone.out_channels, anchors.num_anchors_per_location()[0])
        keep = {"training": 2000, "testing": 1000}
        self.rpn = RegionProposalNetwork(anchors, head, 0.7, 0.3, 256, 0.5, keep, keep, 0.7)

    def forward(self, x: Tensor, boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Objectness and box regression; ``boxes`` (M, 4) of each image."""
        features = list(self.backbone(x).values())
        objectness, deltas = self.rpn.head(features)
        anchors = self.rpn.anchor_generator(ImageList(x, [x.shape[2:]] * len(x)), features)
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        labels, matched = self.rpn.assign_targets_to_anchors(anchors, [{"boxes": b} for b in boxes])
        targets = self.rpn.box_coder.encode(matched, anchors)
        return self.rpn.compute_loss(objectness, deltas, labels, targets)


def train(model: Proposals, steps: int, size: int, device: torch.device) -> list[float]:
    """Losses of a few steps on two images, with a bright rectangle in each to be found."""
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)  # the sampler of positive and negative anchors
    losses = []
    for _ in range(steps):
        x = 0.3 * torch.randn(2, 3, size, size, generator=generator)
        corners = torch.randint(0, size // 2, (2, 2), generator=generator)
        boxes = torch.cat((corners, corners + size // 3), 1).float()
        for image, (left, top, right, bottom) in zip(x, boxes.int().tolist(), strict=True):
            image[:, top:bottom, left:right] += 2
        x = x.to(device, memory_format=torch.channels_last)
        loss = torch.stack(model(x, [b[None].to(device) for b in boxes])).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Two copies of one network, the same data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18", help="resnet18, resnet50, ...")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--size", type=int, default=96)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    torch.manual_seed(0)
    eager = Proposals(args.backbone)
    fused = copy.deepcopy(eager)
    resnet_fast.fuse(fused.backbone)
    print(str(resnet_fast.explain(fused.backbone)).splitlines()[0])

    losses = [train(model, args.steps, args.size, device) for model in (eager, fused)]
    for i, (one, other) in enumerate(zip(*losses, strict=True), 1):
        print(f"step {i}: eager {one:.5f}, fused {other:.5f}")
    if any(abs(one - other) > 1e-2 * max(1.0, abs(one)) for one, other in zip(*losses, strict=True)):
        raise SystemExit("the losses differ")
    print("the losses agree")


if __name__ == "__main__":
    main()
