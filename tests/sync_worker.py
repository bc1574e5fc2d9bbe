"""One rank of test_sync.py: `python -m tests.sync_worker RANK WORLD FILE CASE` leaves its results in FILE.RANK."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: see resnet_fast.recipes.ranks
from torch import Tensor, nn

import resnet_fast
from resnet_fast.models.blocks import BasicBlock, Bottleneck

#: Images of each rank, of the one batch that both make.
SHARES = {"even": (3, 3), "uneven": (4, 2), "empty": (6, 0), "one_value": (1, 1)}
#: On Triton's kernels, interpreted: with joined statistics, and under DistributedDataParallel without.
TRITON = ("triton", "ddp_triton")


def network(momentum: float | None = 0.1, affine: bool = True, tracked: bool = True) -> nn.Sequential:
    """A stem with its pooling, a bottleneck with a projection, one without, a basic block; the same on every rank."""
    torch.manual_seed(0)
    norm: dict[str, Any] = {"momentum": momentum, "affine": affine, "track_running_stats": tracked}
    make: Callable[[int], nn.Module] = lambda channels: nn.BatchNorm2d(channels, **norm)  # noqa: E731
    down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), make(16))
    stem = resnet_fast.Stem.from_modules(nn.Conv2d(3, 8, 7, 2, 3, bias=False), make(8), nn.MaxPool2d(3, 2, 1))
    model = nn.Sequential(
        stem,
        Bottleneck(8, 4, 2, down, norm_layer=make),
        Bottleneck(16, 4, norm_layer=make),
        BasicBlock(16, 16, norm_layer=make),
    )
    for p in model.parameters():
        nn.init.normal_(p, 0.5 if p.dim() == 1 else 0.0, 0.3)
    return model


def network_of(case: str) -> nn.Sequential:
    """Of Triton's, which is interpreted, one bottleneck, the one with a projection."""
    return network()[1:2] if case in TRITON else network(**options(case))


def batch(case: str) -> Tensor:
    """The whole batch, with a mean of its own in every image: ranks that kept to themselves would be far off."""
    size = 5 if case in TRITON else {"one_value": 1}.get(case, 19)
    total, channels = sum(SHARES.get(case, (3, 3))), 8 if case in TRITON else 3
    generator = torch.Generator().manual_seed(1)
    return torch.randn(total, channels, size, size, generator=generator) + torch.arange(total).view(-1, 1, 1, 1)


def options(case: str) -> dict[str, Any]:
    return {
        "cumulative": {"momentum": None},
        "untracked": {"tracked": False},
        "no_affine": {"affine": False},
    }.get(case, {})


def results(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """z, the gradients of the second of two steps, and the buffers after them."""
    for _ in range(2):
        x = x.detach().requires_grad_()
        model.zero_grad()
        z = model(x)
        (z * z.detach().cos()).sum().backward()
    answer = {"z": z.detach(), "x": x.grad}
    answer |= {f"grad {name}": p.grad for name, p in model.named_parameters()}
    answer |= {f"buffer {name}": b for name, b in model.named_buffers()}
    return answer


def own(case: str, rank: int) -> Tensor:
    """This rank's images."""
    return batch(case).split(SHARES.get(case, (3, 3)))[rank].contiguous(memory_format=torch.channels_last)


def main(rank: int, world: int, file: str, case: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    model: nn.Module = network_of(case)
    alone = [dist.new_group([r]) for r in range(world)][rank] if case == "alone" else None
    if case == "ddp_triton":
        model = nn.parallel.DistributedDataParallel(resnet_fast.fuse(model, backend="triton"))
    elif case == "converted_later":
        resnet_fast.fuse(model)
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model, alone)
        resnet_fast.fuse(model, backend="triton" if case == "triton" else None)
    if case == "eval":
        model.eval()
    x = own(case, rank)
    if case == "eval" and rank == 1:
        answer: dict[str, Any] = {}  # nobody waits for this rank
    else:
        answer = {name.replace("module.", ""): value for name, value in results(model, x).items()}
    torch.save(answer, f"{file}.{rank}")
    del model
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
