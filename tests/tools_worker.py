"""One rank of test_tools_distributed.py: `python -m tests.tools_worker RANK WORLD FILE CASE` leaves FILE.RANK."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import resnet_fast
from tests.tools import fused_rows, images, loss_of, small


class Unused(nn.Module):
    """A network of which every other step leaves a block out."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.net.stem(x)
        if self.calls % 2:
            x = self.net.layer1(x)
        return self.net.head(self.net.layer2(x).mean((2, 3)))


def wrapped(case: str, model: nn.Module) -> nn.Module:
    if case == "ddp":
        return DistributedDataParallel(model)
    if case == "static_graph":
        return DistributedDataParallel(model, static_graph=True)
    if case == "bucket_view":
        return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    if case == "find_unused":
        return DistributedDataParallel(Unused(model), find_unused_parameters=True)
    policy: dict[str, Any] = {}
    if case == "fsdp_mixed":
        policy["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for b in model.buffers():  # torch's batch norm has no bfloat16 parameters beside float32 statistics on a CPU
            b.data = b.data.to(torch.bfloat16) if b.is_floating_point() else b.data
    if case == "fsdp_no_reshard":
        policy["reshard_after_forward"] = False
    for stage in (model.layer1, model.layer2):  # type: ignore[union-attr]
        for block in stage:  # type: ignore[union-attr]
            fully_shard(block, **policy)
    return fully_shard(model, **policy)


def full(t: Any) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().float()


def train(case: str, rank: int, fused: bool) -> dict[str, Any]:
    """Two steps; whole gradients of the last, whole parameters and buffers after it; eval's output."""
    model = small()
    if fused and not case.endswith("_first"):
        resnet_fast.fuse(model)
    parallel = wrapped(case.removesuffix("_first"), model)
    if fused and case.endswith("_first"):
        resnet_fast.fuse(parallel)
    rows = 0
    optimizer = torch.optim.SGD(parallel.parameters(), 0.01, momentum=0.9)
    for i in range(2):
        optimizer.zero_grad()
        x = images(8)[rank::2] + i
        loss_of(parallel, x).backward()
        rows = fused_rows(model)
        optimizer.step()
    answer: dict[str, Any] = {"rows": rows}
    for name, p in parallel.named_parameters():
        answer[f"grad {name}"] = torch.zeros(()) if p.grad is None else full(p.grad)
        answer[f"parameter {name}"] = full(p)
    answer |= {f"buffer {name}": full(b) for name, b in parallel.named_buffers()}
    parallel.eval()
    with torch.no_grad():
        answer["first"] = full(parallel(images(3)))
        answer["second"] = full(parallel(images(3)))
        if fused:  # unfused, it is as sharded as before, and says the same
            kinds = [isinstance(m, FSDPModule) for m in model.modules()]
            resnet_fast.unfuse(parallel)
            assert [isinstance(m, FSDPModule) for m in model.modules()] == kinds
            assert not any(hasattr(type(m), "_resnet_fast_original") for m in model.modules())
            torch.testing.assert_close(full(parallel(images(3))), answer["first"], rtol=1e-2, atol=1e-2)
    return answer


def main(rank: int, world: int, file: str, case: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    torch.save([train(case, rank, fused) for fused in (False, True)], f"{file}.{rank}")
    dist.barrier()
    dist.destroy_process_group()
    # torch's caches of sharded operations hold the group and its threads, one of which may abort a process that is
    # ending: see resnet_fast.recipes.ranks. So this one does not end, it stops.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
