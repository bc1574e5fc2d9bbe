"""One process or many: what torchrun has started, and the few things that ranks tell each other."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: its functions keep the one they find as a default (see close)
from torch import Tensor, nn

__all__ = ["Ranks"]


class Ranks:
    """This process among those of a torchrun (WORLD_SIZE, RANK, LOCAL_RANK), or alone. gloo on a CPU, NCCL on GPUs.

    NCCL is not yet run.
    """

    def __init__(self, device: str) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(device)
        if device == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        self._own_group = False
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
            self._own_group = True

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Added up over all ranks, on all of them."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on some rank."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item())

    def gather(self, item: Any) -> list[Any]:
        """Each rank's item, by rank, on all of them."""
        if self.world == 1:
            return [item]
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item)
        return items

    def average_gradients(self, model: nn.Module) -> None:
        """What DistributedDataParallel does; it refuses nn.SyncBatchNorm on a CPU, which our fused blocks can."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, flat.div_(self.world).split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def buffers(self, model: nn.Module) -> None:
        """Every rank gets the first rank's running statistics."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def close(self) -> None:
        """Leave the group, if this object made it, and end its threads: nothing else may hold the group any more.

        ``destroy_process_group`` drops torch's references alone; the threads end with the last one, of which
        DistributedDataParallel has some. A gloo thread that lets a tensor go while the interpreter is ending takes
        the whole process with it ("terminate called without an active exception",
        https://github.com/pytorch/pytorch/issues/190489).
        """
        if self._own_group and dist.is_initialized():
            gc.collect()
            dist.destroy_process_group()
