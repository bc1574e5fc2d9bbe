"""Residual blocks as everyone's repository has them, CIFAR's above all: known by what their forward does.

The classes live in files of the user's own, with a functional ReLU, a shortcut that is an empty Sequential, a lambda or
convolution and norm, the two branches as Sequentials or one by one. So the block is traced, whatever it looks like.
"""

from __future__ import annotations

from typing import Any

from . import tracing
from .common import BlockPlan, HostPlan

NAMES = frozenset(("BasicBlock", "BottleNeck", "Bottleneck", "BottleneckBlock", "ResBlock", "ResidualBlock"))


def block(block: Any) -> BlockPlan | HostPlan | None:
    """A plan that fuses the block's end, or None: single runs inside are left to ``generic=True``."""
    if not tracing.holds_run(block):
        return None
    plan = tracing.plan(block)
    if isinstance(plan, BlockPlan):
        return plan if plan.shortcut is not None else None
    if isinstance(plan, HostPlan) and plan.kind != "traced":
        return plan
    return None
