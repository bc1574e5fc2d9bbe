"""After fuse(): DataParallel, DistributedDataParallel and FSDP2's fully_shard; two processes with gloo on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import needs_gloo, two_ranks
from tests.tools import FUSED, assert_same_state, fused_rows, images, loss_of, near, pair


def mean_error(tensors: list[Tensor], refs: list[Tensor]) -> float:
    """The mean over tensors of their error's norm beside the reference's."""
    errors = [((t - ref).norm() / (ref.norm() + 1e-12)).item() for t, ref in zip(tensors, refs, strict=True)]
    return sum(errors) / len(errors)


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *("ddp", "static_graph", "find_unused", "bucket_view", "fsdp", "fsdp_mixed", "fsdp_no_reshard"),
        *("ddp_first", "fsdp_first"),  # wrapped, then fused
    ],
)
def test_two_processes(case: str, tmp_path: Path) -> None:
    """Gradients, parameters, buffers and outputs of two steps: those of the unfused model, on every rank."""
    answers = two_ranks("tools_worker", case, tmp_path, timeout=180)
    for rank, (plain, ours) in enumerate(answers):
        plain.pop("rows")
        assert ours.pop("rows") == FUSED, f"rank {rank}: not fused inside"
        assert ours.keys() == plain.keys()
        for name, value in plain.items():
            if case != "fsdp_mixed":
                near(ours[name], value, f"rank {rank}, {name}")
    for name, value in answers[0][1].items():
        if name.startswith(("grad", "parameter")):
            assert torch.equal(value, answers[1][1][name]), f"{name} differs between ranks"
    if case == "fsdp_mixed":  # a network of batch norms in bfloat16 is far from float32's, ours no farther than torch's
        full = two_ranks("tools_worker", "fsdp", tmp_path / "full", timeout=180)[0][0]
        plain, ours = answers[0]
        for kind in ("grad", "parameter", "buffer", "first"):
            names = [name for name in full if name.startswith(kind) and full[name].is_floating_point()]
            assert names
            theirs, mine = (mean_error([t[n] for n in names], [full[n] for n in names]) for t in (plain, ours))
            assert mine <= 1.5 * theirs + 1e-3, f"{kind}: error {mine:.3g}, torch's own {theirs:.3g}"


def test_data_parallel_on_the_cpu() -> None:
    """Without GPUs it calls the module; keys get its prefix and lose it again."""
    plain, ours = pair()
    parallel = nn.DataParallel(ours)
    loss_of(parallel, images()).backward()
    loss_of(plain, images()).backward()
    assert_same_state(parallel.module, plain)
    assert fused_rows(parallel) == FUSED


def test_replicas_have_guards_of_their_own() -> None:
    """DataParallel's replicas share a module's state: each is looked at by itself, and none is taken for another."""
    plain, ours = pair(train=False)
    with torch.no_grad():
        expected = ours(images())
        for factor in (1.0, 2.0, 0.5):
            replicas = []
            for model in (ours, plain):
                replica = model._replicate_for_data_parallel()
                replica.stem = model.stem._replicate_for_data_parallel()
                for i, name in enumerate(("0", "1", "2")):
                    child = model.stem[i]._replicate_for_data_parallel()
                    for key, p in model.stem[i]._parameters.items():  # as torch.nn.parallel.replicate does
                        if p is None:
                            child._parameters[key] = None
                        else:
                            setattr(child, key, p * factor)
                    replica.stem._modules[name] = child
                replicas.append(replica)
            near(replicas[0](images()), replicas[1](images()), f"factor {factor}")
            assert torch.equal(ours(images()), expected)


@pytest.mark.gpu
def test_data_parallel_on_gpus() -> None:
    plain, ours = (m.cuda() for m in pair())
    parallel = nn.DataParallel(ours)
    for _ in range(2):
        loss_of(parallel, images(8).cuda()).backward()
        loss_of(nn.DataParallel(plain), images(8).cuda()).backward()
    assert_same_state(ours, plain)
