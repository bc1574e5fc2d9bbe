"""What ``bench`` and ``info`` print: plain text, columns aligned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from resnet_fast.fuse import Explanation

from .judging import Check
from .timing import Result

__all__ = ["equality", "explanation", "header", "section", "speed", "table"]


def table(rows: Sequence[Sequence[str]], right: Iterable[int] = (), indent: str = "  ") -> str:
    """Rows of cells as lines; the first row is the head. ``right``: columns that are aligned to the right."""
    numbers = set(right)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        indent
        + "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def header(record: dict[str, Any]) -> str:
    """Machine, versions and build, of ``machine.provenance``."""
    v = record["versions"]
    build = record["build"]
    lines = []
    for gpu in record["gpus"]:
        lines.append(f"gpu      {gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB, driver {v['driver']}, CUDA {v['cuda']}")
    lines.append(f"cpu      {record['cpu']}, {record['cores']} cores, {record['threads']} threads")
    lines.append(
        f"torch    {v['torch']}, triton {v['triton'] or 'none'}, oneDNN {v['onednn'] or 'none'}, "
        f"cuDNN {v['cudnn'] or 'none'}, python {v['python']}"
    )
    if "missing" in build:
        kernels = f"no kernels of its own: {build['missing']}. Remedy: {build['remedy']}"
    else:
        cuda = f"CUDA {' '.join(build['cuda_archs'])}" if build["cuda"] else f"no CUDA kernels ({build['reason']})"
        kernels = f"CPU kernels for {record['isa']}; {cuda}"
    commit = f", commit {record['commit']}" if record["commit"] else ""
    lines.append(f"ours     resnet_fast {v['resnet_fast']}{commit}; {kernels}")
    return "\n".join(lines)


def explanation(rows: Explanation, verbose: bool) -> str:
    """What is fused: every row, or counts by kind and all the rows that are not wholly fused."""
    counts = Counter(row.status for row in rows)
    title = f"fused: {counts['fused']} blocks, {counts['partly']} partly, {counts['not']} not"
    if verbose:
        lines = [["name", "kind", "status", "reason"]]
        lines += [[row.name or "(root)", row.kind, row.status, row.reason] for row in rows]
        return f"{title}\n{table(lines)}"
    kinds = Counter((row.kind, row.status) for row in rows)
    lines = [["kind", "fused", "partly", "not"]]
    for kind in dict.fromkeys(row.kind for row in rows):
        lines.append([kind, *(str(kinds[kind, status] or "") for status in ("fused", "partly", "not"))])
    text = f"{title}\n{table(lines, right=(1, 2, 3))}"
    rest = [[row.name or "(root)", row.kind, row.status, row.reason] for row in rows if row.status != "fused"]
    return text + (f"\n{table([['name', 'kind', 'status', 'reason'], *rest])}" if rest else "")


def equality(checks: Sequence[Check]) -> str:
    """Errors against float64: ours, torch's in the same dtype, and the bound."""
    lines = [["mode", "dtype", "what", "error", "torch's own", "bound", "max|ref|", "", "nearest to its bound"]]
    for c in checks:
        numbers = [f"{value:.2e}" for value in (c.ours, c.torch, c.bound, c.largest)]
        which = c.tensor if c.tensors == 1 else f"{c.tensor} (of {c.tensors})"
        lines.append([c.mode, c.dtype, c.what, *numbers, "ok" if c.ok else "WRONG", which])
    title = "equality: max|ours - float64| <= 2 max|torch in the same dtype - float64| + 4 eps max|float64|"
    if any(c.what.startswith("gradients,") for c in checks):
        title += "\n  (gradients: each relative to its own max|float64|; the worst and the median of the parameters)"
    return f"{title}\n{table(lines, right=(3, 4, 5, 6))}"


def section(name: str, checks: Sequence[Check], notes: Sequence[str], verbose: bool) -> str:
    """A section of ``verify``: of each group of checks the one nearest to its bound, and what is wrong.

    Groups are dtype, mode and kind of number; in "adversarial" the inputs. "determinism" has counts of tensors instead.
    """
    failed = sum(not c.ok for c in checks)
    title = f"{name}: {len(checks) - failed} of {len(checks)} checks passed"
    rest = [f"  not checked: {note}" for note in notes]
    if not checks:
        return "\n".join([title, *rest])
    if name == "determinism":
        lines = [["dtype", "mode", "tensors", "differ in some bit", "", "the first that does"]]
        for c in checks:
            verdict = "ok" if c.ok else "WRONG"
            lines.append([c.dtype, c.mode, str(c.tensors), f"{c.ours:.0f}", verdict, "" if c.ok else c.tensor])
        return "\n".join([title, table(lines, right=(2, 3)), *rest])
    by_input = name == "adversarial"
    groups: dict[tuple[str, ...], list[Check]] = {}
    for c in checks:
        groups.setdefault((c.tensor.partition(":")[0],) if by_input else (c.dtype, c.mode, c.what), []).append(c)
    columns = ["input"] if by_input else ["dtype", "mode", "what"]
    lines = [[*columns, "checks", "error", "torch's own", "bound", "of bound", "", "nearest to its bound"]]

    def row(key: tuple[str, ...], group: Sequence[Check], c: Check) -> list[str]:
        numbers = [f"{value:.2e}" for value in (c.ours, c.torch, c.bound)]
        share = f"{c.ours / c.bound:.0%}" if c.bound and c.ours < float("inf") else ""
        where = f"{c.dtype} {c.mode} {c.what}: {c.tensor.partition(': ')[2]}" if by_input else c.tensor
        return [*key, str(len(group)), *numbers, share, "ok" if c.ok else "WRONG", where]

    for key, group in groups.items():
        worst = max(group, key=lambda c: (not c.ok, c.ours / c.bound if c.bound else c.ours))
        others = group if verbose else [c for c in group if not c.ok and c is not worst][:4]
        lines.append(row(key, group, worst))
        lines += [row(key, [c], c) for c in others if c is not worst]
    first = len(columns)
    return "\n".join([title, table(lines, right=range(first, first + 5)), *rest])


def _bytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f} MiB"


def speed(title: str, results: Sequence[Result], baseline: str) -> str:
    """One setting's contenders: images per second, ms a call, ratio to the baseline, memory."""
    lines = [["", "img/s", f"x {baseline}", "ms p50", "p20", "p80", "peak", "saved", "first call"]]
    notes = []
    for r in results:
        if r.failed is not None or r.ms is None or r.images_per_second is None or r.ratio is None:
            lines.append([r.name, *[""] * 8])
            notes.append(f"  {r.name} cannot run: {r.failed}")
            continue
        p20, p50, p80 = (f"{t:.1f}" if t >= 10 else f"{t:.2f}" for t in r.ms)
        first = f"{r.first:.1f} s" if r.first is not None and r.name == "compile" else ""
        memory = _bytes(r.peak), _bytes(r.saved)
        lines.append([r.name, f"{r.images_per_second:.1f}", f"{r.ratio:.2f}", p50, p20, p80, *memory, first])
    done = next((r for r in results if r.rounds), None)
    rounds = f" ({done.rounds} rounds)" if done else ""
    return "\n".join([title + rounds, table(lines, right=range(1, 9)), *notes])
