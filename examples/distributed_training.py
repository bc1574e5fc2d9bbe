"""Train on several processes: torchrun, DistributedDataParallel or FSDP2; NCCL on GPUs, gloo on CPUs.

    torchrun --standalone --nproc-per-node 2 examples/distributed_training.py --steps 3
    torchrun --standalone --nproc-per-node 2 examples/distributed_training.py --steps 3 --fsdp --sync-batchnorm

Nothing here is resnet_fast's own but ``fuse(model)``, before the model is wrapped. SyncBatchNorm trains fused.
"""

from __future__ import annotations

import argparse
import gc
import os

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which its functions would hold to the end of the process
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import resnet_fast
from resnet_fast import models


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a network of resnet_fast.models")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4, help="images a rank")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--fsdp", action="store_true", help="shard parameters instead of copying them")
    parser.add_argument("--sync-batchnorm", action="store_true", help="statistics over the batches of all ranks")
    args = parser.parse_args()
    if args.sync_batchnorm and not args.fsdp and not torch.cuda.is_available():
        parser.error("--sync-batchnorm: DistributedDataParallel takes it on GPUs alone. Remedy: add --fsdp")

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    train(args)
    # A thread of gloo that lets a tensor go while Python ends aborts the process, which has done all its work
    # (https://github.com/pytorch/pytorch/issues/190489). The threads end with the last object that knows the group, so
    # that the model goes first; torch itself keeps the meshes of FSDP2, and a barrier is a last task without tensors.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def train(args: argparse.Namespace) -> None:
    """Some steps, and whether all ranks agree."""
    on_gpu = torch.cuda.is_available()
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)

    torch.manual_seed(0)  # the same weights on every rank
    model: nn.Module = models.create(args.model, num_classes=10).to(device)
    if not args.fsdp:  # fully_shard takes contiguous parameters alone; the images are channels_last either way
        model.to(memory_format=torch.channels_last)
    if args.sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    resnet_fast.fuse(model)
    if rank == 0:
        print(f"{world} ranks on {device.type}; {str(resnet_fast.explain(model)).splitlines()[0]}")

    if args.fsdp:
        for name in ("layer1", "layer2", "layer3", "layer4"):
            fully_shard(getattr(model, name))
        parallel = fully_shard(model)
    else:
        parallel = DistributedDataParallel(model, device_ids=[device.index] if on_gpu else None)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05, momentum=0.9)

    generator = torch.Generator().manual_seed(rank)  # other data on every rank
    for step in range(1, args.steps + 1):
        x = torch.randn(args.batch, 3, args.size, args.size, generator=generator)
        y = torch.randint(10, (args.batch,), generator=generator).to(device)
        loss = nn.functional.cross_entropy(parallel(x.to(device, memory_format=torch.channels_last)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step}: loss {mean.item() / world:.4f}")

    # Every rank holds the same weights: the sum of their magnitudes tells.
    total = sum(p.full_tensor().abs().sum() if args.fsdp else p.abs().sum() for p in parallel.parameters()).detach()
    totals = [torch.empty_like(total) for _ in range(world)]
    dist.all_gather(totals, total)
    if rank == 0:
        print(f"weights are equal on all ranks: {all(torch.equal(t, total) for t in totals)}")


if __name__ == "__main__":
    main()
