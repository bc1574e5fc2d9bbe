"""Synchronised batch norm: two processes with gloo, against one process with the joined batch.

torch's own nn.SyncBatchNorm refuses CPU tensors: what it documents is held against nn.BatchNorm2d on the whole batch,
statistics over all ranks (unbiased running variance by the total count), input gradients as those of the joined batch,
and each rank's parameter gradients such that their sum is the joined batch's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resnet_fast import functional
from resnet_fast.dispatch import reasons
from resnet_fast.functional import ConvBn, residual_block
from tests.ranks import needs_gloo, two_ranks
from tests.sync_worker import SHARES, batch, network, network_of, own, results

pytestmark = needs_gloo


def close(ours: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Beside the largest: the sums of a channel's gradients cancel."""
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        ours.double(), expected.double(), rtol=1e-4, atol=1e-4 * scale + 1e-6, msg=lambda m: f"{what}: {m}"
    )


def joined(case: str) -> dict[str, torch.Tensor]:
    """One process, the whole batch, torch's own modules in float64."""
    torch.manual_seed(0)
    model = network_of(case).double()
    if case == "eval":
        model.eval()
    x = batch(case).double()
    # The stem is one of our modules: float64 runs by the definitions.
    return results(model, x)


needs_triton = pytest.mark.skipif(
    reasons("conv_stats", torch.device("cpu"), torch.float32)["triton"] is not None, reason="needs Triton's interpreter"
)
CASES = ("even", "uneven", "empty", "cumulative", "untracked", "no_affine", "converted_later")


@pytest.mark.parametrize("case", [*CASES, pytest.param("triton", marks=[needs_triton, pytest.mark.slow])])
def test_equals_the_joined_batch(case: str, tmp_path: Path) -> None:
    ranks, expected = two_ranks("sync_worker", case, tmp_path), joined(case)
    assert set(expected) == set(ranks[0]) == set(ranks[1])
    for name, value in expected.items():
        first, second = ranks[0][name], ranks[1][name]
        if name.startswith(("z", "x")):
            close(torch.cat((first, second)), value, name)
        elif name.startswith("grad"):
            close(first + second, value, name)
        else:
            assert torch.equal(first, second), name
            close(first, value, name)
    if case == "empty":
        assert ranks[1]["z"].shape[0] == 0 and ranks[1]["x"].shape[0] == 0


@needs_triton
@pytest.mark.slow
def test_ddp_on_triton(tmp_path: Path) -> None:
    """Each rank normalises its own images; gradients are the ranks' mean, running statistics the first rank's."""
    ranks = two_ranks("sync_worker", "ddp_triton", tmp_path)
    alone = [results(network_of("ddp_triton").double(), own("ddp_triton", r).double()) for r in (0, 1)]
    for name, value in alone[0].items():
        if name.startswith("grad"):
            assert torch.equal(ranks[0][name], ranks[1][name]), name
            close(ranks[0][name], (value + alone[1][name]) / 2, name)
        else:
            close(ranks[0][name], value, name)
            if name in ("z", "x"):
                close(ranks[1][name], alone[1][name], name)


def test_one_value_on_each_rank_is_enough(tmp_path: Path) -> None:
    """As in nn.SyncBatchNorm: two ranks make two values, where a rank by itself would be refused."""
    ranks, expected = two_ranks("sync_worker", "one_value", tmp_path), joined("one_value")
    close(torch.cat([rank["z"] for rank in ranks]), expected["z"], "z")


def test_a_group_of_ones_own(tmp_path: Path) -> None:
    """process_group says over whom: alone in it, a rank is an ordinary batch norm."""
    ranks = two_ranks("sync_worker", "alone", tmp_path)
    for r in (0, 1):
        expected = results(network().double(), own("even", r).double())
        for name, value in expected.items():
            close(ranks[r][name], value, f"rank {r}, {name}")


def test_in_eval_nobody_waits(tmp_path: Path) -> None:
    ranks = two_ranks("sync_worker", "eval", tmp_path)
    assert ranks[1] == {}
    expected = network().eval()(own("even", 0))
    close(ranks[0]["z"], expected.detach(), "z")


def test_the_merge_is_the_statistics_of_all() -> None:
    """What two ranks gather is merged by bn_finalize: without processes, by a group that is not asked."""
    torch.manual_seed(0)
    parts = [torch.randn(n, 8, 5, 5) + 3 for n in (1, 4)]
    w = torch.randn(6, 8, 1, 1)
    gathered = [functional.ops.conv_stats(x, w, [1, 1], [0, 0], [1, 1], 1) for x in parts]
    n = torch.tensor([float(x.numel() // 8) for x in parts])
    merged = functional.ops.bn_finalize(n, *(torch.stack([g[i] for g in gathered]) for i in (1, 2)))
    whole = functional.ops.conv_stats(torch.cat(parts), w, [1, 1], [0, 0], [1, 1], 1)[1:]
    for ours, expected in zip(merged, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_every_rank_raises_what_torch_raises() -> None:
    """Without a group one value per channel is refused in torch's own words."""
    layer = ConvBn(torch.randn(4, 4, 1, 1), torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        residual_block(torch.randn(1, 4, 1, 1), [layer])


def test_shares_are_what_they_say() -> None:
    assert [own("uneven", r).shape[0] for r in (0, 1)] == list(SHARES["uneven"])
