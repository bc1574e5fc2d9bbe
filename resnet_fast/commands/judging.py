"""The project's one rule of tolerance, for tensors by their names.

max|ours - ref64| <= 2 max|torch_same_dtype - ref64| + 4 eps(dtype) max|ref64|, where ref64 is the same in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Check", "different", "judge", "judge_gradients", "judge_norms", "max_error", "name_of"]


class Check(NamedTuple):
    """One kind of number compared, of all its tensors the one nearest to its bound (or farthest beyond it).

    ``ours`` and ``torch``: max|difference to ref64|; ``bound``: what ours may be at most; ``largest``: max|ref64|.
    """

    mode: str
    dtype: str
    what: str
    tensor: str
    tensors: int
    ours: float
    torch: float
    bound: float
    largest: float
    ok: bool


def max_error(a: Tensor, reference: Tensor) -> float:
    """max|a - reference|; infinite where one has a NaN or an infinity that the other does not have there."""
    if a.shape != reference.shape:
        return float("inf")
    a, reference = a.detach().double(), reference.detach().double()
    same = (a == reference) | (a.isnan() & reference.isnan())
    difference = (a - reference).abs().masked_fill(same, 0.0)
    return float(torch.nan_to_num(difference, nan=float("inf")).max()) if difference.numel() else 0.0


def judge(
    mode: str,
    dtype: torch.dtype,
    what: str,
    ours: Mapping[str, Tensor],
    same: Sequence[Mapping[str, Tensor]],
    reference: Mapping[str, Tensor],
) -> Check:
    """Judge every tensor by the rule, and report the one nearest to its bound. ``same``: torch's ways."""
    found: list[tuple[float, Check]] = []
    for name in reference if all(t.keys() == reference.keys() for t in (ours, *same)) else ():
        largest = _largest(reference[name])
        mine = max_error(ours[name], reference[name])
        theirs = max(max_error(t[name], reference[name]) for t in same)
        bound = 2 * theirs + 4 * torch.finfo(dtype).eps * largest
        ok = mine <= bound and mine < float("inf")
        rank = mine / bound if bound else float(mine > 0)
        check = Check(mode, name_of(dtype), what, name, len(reference), mine, theirs, bound, largest, ok)
        found.append((rank, check))
    if not found:
        nan = float("nan")
        return Check(mode, name_of(dtype), what, "not the same tensors", 0, nan, nan, nan, nan, False)
    return max(found, key=lambda pair: (not pair[1].ok, pair[0]))[1]


def judge_gradients(
    dtype: torch.dtype,
    ours: Mapping[str, Tensor],
    same: Sequence[Mapping[str, Tensor]],
    reference: Mapping[str, Tensor],
) -> list[Check]:
    """All parameters together, by each one's error relative to its own max|ref64|: the worst and the median one.

    One by one they cannot be judged: rounding turns a few ReLUs over, in ours at other places than in torch's, and a
    gradient behind one jumps. Parameters whose gradient all but vanishes (a bias that batch norm cancels) weigh little.
    """
    if not all(t.keys() == reference.keys() for t in (ours, *same)):
        return [judge("train", dtype, "gradients", ours, same, reference)]
    least = 1e-3 * max(_largest(t) for t in reference.values())
    sizes = {n: max(_largest(t), least) or 1.0 for n, t in reference.items()}

    def relative(gradients: Mapping[str, Tensor]) -> dict[str, float]:
        return {n: max_error(gradients[n], t) / sizes[n] for n, t in reference.items()}

    mine, theirs = relative(ours), [relative(t) for t in same]
    found = []
    for what, position in (("gradients, worst", -1), ("gradients, median", len(mine) // 2)):
        name, error = sorted(mine.items(), key=lambda item: item[1])[position]
        own = max(sorted(t.values())[position] for t in theirs)
        bound = 2 * own + 4 * torch.finfo(dtype).eps
        ok = error <= bound and error < float("inf")
        found.append(Check("train", name_of(dtype), what, name, len(mine), error, own, bound, 1.0, ok))
    return found


def _largest(t: Tensor) -> float:
    return float(torch.nan_to_num(t.detach().abs()).max()) if t.numel() else 0.0


def name_of(dtype: torch.dtype) -> str:
    """float32, bfloat16, ..."""
    return str(dtype).removeprefix("torch.")


def judge_norms(
    dtype: torch.dtype,
    what: str,
    ours: Mapping[str, Tensor],
    same: Sequence[Mapping[str, Tensor]],
    reference: Mapping[str, Tensor],
) -> Check:
    """The rule for root mean squares: rms(ours - ref64) / rms(ref64) <= 2 rms(torch - ref64) / rms(ref64) + 4 eps.

    A tensor that all but vanishes beside the others is measured by a thousandth of the largest.
    """

    def rms(t: Tensor) -> float:
        return float(t.detach().double().square().mean().sqrt()) if t.numel() else 0.0

    if not all(t.keys() == reference.keys() for t in (ours, *same)):
        return judge("train", dtype, what, ours, same, reference)
    least = 1e-3 * max(rms(t) for t in reference.values())
    found: list[tuple[float, Check]] = []
    for name, ref in reference.items():
        size = max(rms(ref), least) or 1.0
        mine, *theirs = (rms(t[name].double() - ref) / size for t in (ours, *same))
        bound = 2 * max(theirs) + 4 * torch.finfo(dtype).eps
        check = Check("train", name_of(dtype), what, name, len(reference), mine, max(theirs), bound, 1.0, mine <= bound)
        found.append((mine / bound, check))
    return max(found, key=lambda pair: (not pair[1].ok, pair[0]))[1]


def different(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that differ in some bit, a NaN's place included."""
    return [
        n
        for n, t in one.items()
        if not (torch.equal(t.isnan(), other[n].isnan()) and torch.equal(t.nan_to_num(), other[n].nan_to_num()))
    ]
