"""The house rules that a machine can hold: who imports whom, what every op has, and what a process may load."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import resnet_fast
from resnet_fast.dispatch import BACKENDS, OPS
from tests import cases, eager

ROOT = Path(__file__).parents[1]
PACKAGE, CSRC = ROOT / "resnet_fast", ROOT / "csrc"
MODULES = sorted(PACKAGE.rglob("*.py"))

# ---- who imports whom

#: A module may import those on lower floors. A package's modules stand on its floor and may import each other.
FLOORS = {
    "_C": -1,
    "buffers": -1,
    "switches": -1,
    "tables": -1,
    "backends": 0,
    "dispatch": 1,
    "ops": 1,
    "functional": 2,
    "autograd": 2,
    "layers": 2,
    "folding": 2,
    "inference": 2,
    "watch": 2,
    "plan": 3,
    "sums": 3,
    "guards": 3,
    "norm_act": 3,
    "running": 3,
    "schedule": 3,
    "modules": 3,
    "capture": 3,
    "adapters": 4,
    "fuse": 4,
    "swap": 4,
    "tuning": 4,
    "inference_tuning": 4,
    "models": 4,
    "recipes": 5,
    "commands": 5,
    "__main__": 5,
    "__init__": 5,
}
#: On one floor, left may import right.
SIDEWAYS = {
    ("buffers", "switches"),
    ("ops", "dispatch"),
    ("functional", "autograd"),
    ("functional", "layers"),
    ("autograd", "layers"),
    ("folding", "layers"),
    ("folding", "functional"),
    ("folding", "watch"),
    ("inference", "layers"),
    ("inference", "functional"),
    ("sums", "plan"),
    ("guards", "plan"),
    ("guards", "sums"),
    ("norm_act", "guards"),
    ("norm_act", "plan"),
    ("running", "guards"),
    ("running", "plan"),
    ("running", "sums"),
    ("modules", "plan"),
    ("modules", "running"),
    ("schedule", "guards"),
    ("schedule", "plan"),
    ("schedule", "sums"),
    ("fuse", "adapters"),
    ("fuse", "swap"),
    ("tuning", "fuse"),
    ("tuning", "inference_tuning"),
    ("inference_tuning", "fuse"),
    ("recipes", "commands"),  # their errors, progress, plots
    ("commands", "recipes"),  # train, evaluate, analyze
    ("__main__", "commands"),
    ("__main__", "__init__"),
    ("commands", "__init__"),  # commands use the package as its users do
    ("recipes", "__init__"),
}
#: What stands in backends/ for them to call.
NO_BACKENDS = ("direct", "library", "own", "pointwise", "winograd")


def cell(path: Path) -> str:
    """The module, or the package directly below resnet_fast, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Absolute names of everything that a file imports, also inside functions and by importlib."""
    package = ["resnet_fast", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def cells_imported(path: Path) -> Iterator[str]:
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "resnet_fast":
            known = len(parts) > 1 and (parts[1] in FLOORS or (PACKAGE / f"{parts[1]}.py").exists())
            yield parts[1] if known else "__init__"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_imports_upward_or_sideways(path: Path) -> None:
    own = cell(path)
    assert own in FLOORS, f"{own} has no floor: give it one, here and in CONTRIBUTING.md"
    for other in cells_imported(path):
        assert other in FLOORS, f"{own} imports {other}, which has no floor"
        allowed = other == own or FLOORS[other] < FLOORS[own] or (own, other) in SIDEWAYS
        assert allowed, f"{own} (floor {FLOORS[own]}) imports {other} (floor {FLOORS[other]})"
        # Backends are reached through dispatch alone, and the kernels through backends.
        assert other == own or other not in ("backends", "_C") or (own, other) == ("backends", "_C")


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "backends").rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE / "backends"))
)
def test_backends_know_torch_and_their_kernels_alone(path: Path) -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    ours = {f"resnet_fast.backends.{name}" for name in NO_BACKENDS}
    own = {"resnet_fast._C", "resnet_fast.buffers", "resnet_fast.switches", *ours}
    for name in imported(path):
        own_package = path.parent.name != "backends" and name.startswith(f"resnet_fast.backends.{path.parent.name}.")
        theirs = name.rpartition(".")[0] in ours
        assert name.split(".")[0] in allowed or name in own or theirs or own_package, name


def test_what_lies_beside_the_backends() -> None:
    """A file there is a backend, or one of those that backends call: then dispatch knows nothing of it."""
    there = {
        path.stem
        for path in (PACKAGE / "backends").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert there == {"__init__", *BACKENDS, *NO_BACKENDS} and not set(BACKENDS) & set(NO_BACKENDS)


def test_the_import_walk_sees_what_it_should() -> None:
    """A rule that cannot fail holds nothing."""
    assert set(cells_imported(PACKAGE / "ops.py")) == {"dispatch"}
    assert "ops" in set(cells_imported(PACKAGE / "autograd.py"))
    assert "_C" in set(cells_imported(PACKAGE / "backends" / "native" / "common.py"))
    assert "adapters" in set(cells_imported(PACKAGE / "fuse.py"))


def test_csrc_knows_neither_torch_nor_python() -> None:
    sources = [p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu")]
    assert len(sources) > 5
    users = set()
    for source in sources:
        for include in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', source.read_text(), re.MULTILINE):
            assert not re.match(r"torch/|ATen/|c10/|caffe2/|Python\.h", include), f"{source.name} includes {include}"
            if include.startswith("pybind11/"):
                users.add(source.name)
    assert users == {"bindings.cpp"}


# ---- every op


@pytest.mark.parametrize("name", BACKENDS)
def test_backend_functions_have_their_ops_signature(name: str) -> None:
    try:
        module = importlib.import_module(f"resnet_fast.backends.{name}")
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported: {error}")
    found = [op for op in OPS if hasattr(module, op)]
    assert found and list(inspect.signature(module.why_not).parameters) == ["op", "device", "dtype"]
    for op in found:
        function = getattr(module, op)
        ours, theirs = inspect.signature(function).parameters.values(), OPS[op].signature.parameters.values()
        assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs], op
        assert typing.get_type_hints(function) == typing.get_type_hints(OPS[op].definition), op
    missing = [op for op in OPS if op not in found]
    for op in missing:
        assert module.why_not(op, torch.device("cpu"), torch.float32) is not None or name == "native"


@pytest.mark.parametrize("name", [name for name in BACKENDS if (PACKAGE / "backends" / name).is_dir()])
def test_backends_of_many_files_offer_every_op_they_have(name: str) -> None:
    """By the sources: the backend may be unable here. An op left out of ``__init__`` would run elsewhere, silently."""
    folder = PACKAGE / "backends" / name
    trees = {path.stem: ast.parse(path.read_text()).body for path in folder.glob("*.py")}
    there = {node.name for body in trees.values() for node in body if isinstance(node, ast.FunctionDef)} & set(OPS)
    offered = {a.name for node in trees["__init__"] if isinstance(node, ast.ImportFrom) for a in node.names}
    assert len(there) > 10 and there <= offered


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_docstring_cases_and_tests(op: str) -> None:
    doc = inspect.getdoc(OPS[op].definition)
    assert doc and len(doc) > 40 and OPS[op].__doc__ == OPS[op].definition.__doc__
    assert cases.VARIANTS[op] and op in eager.EAGER
    named = [f for f in (ROOT / "tests").glob("test_*.py") if re.search(rf'"{op}"', f.read_text())]
    assert {f.name for f in named} & {"test_bn_act.py", "test_conv.py", "test_stem.py", "test_bottleneck.py"}, (
        f"{op} is in no test of its row"
    )
    # The usual variant and one without any option cover every argument.
    reached = set().union(*(cases.inputs(op, cases.TINY[0], variant=v) for v in cases.VARIANTS[op]))
    assert reached == set(OPS[op].signature.parameters)


def test_the_table() -> None:
    assert sum(case.count for case in cases.RESNET50) == 53
    assert len({case.name for case in cases.RESNET50}) == len({case[1:-1] for case in cases.RESNET50}) == 23
    # 4.09 G multiply-adds a picture (arXiv 1512.03385, table 1, in the v1.5 geometry), 23.5 M weights of convolutions.
    macs = sum(c.count * c.NPQ * c.K * c.C * c.R**2 for c in cases.RESNET50)
    assert round(macs / 1e9, 2) == 4.09
    assert sum(c.count * c.K * c.C * c.R**2 for c in cases.RESNET50) == 23_454_912
    assert cases.resnet50(8)[3].N == 8
    names = [case.name for case in cases.TINY + cases.NASTY]
    assert len(names) == len(set(names))
    kinds = {(case.R, case.stride) for case in cases.TINY}
    assert {(case.R, case.stride) for case in cases.RESNET50} <= kinds


# ---- public names, and comments


def public() -> Iterator[tuple[str, object]]:
    for info in pkgutil.walk_packages([str(PACKAGE)], "resnet_fast."):
        if info.name.rpartition(".")[2] in ("__main__", "_C") or ".backends." in info.name:
            continue
        try:
            module = importlib.import_module(info.name)
        except ImportError as error:
            if "resnet_fast" in str(error.name):
                raise
            continue  # an optional library: test_commands and the recipes' own tests say which
        for name in getattr(module, "__all__", ()):
            yield f"{info.name}.{name}", getattr(module, name)
    for name in resnet_fast.__all__:
        yield f"resnet_fast.{name}", getattr(resnet_fast, name)


def test_every_public_name_exists_and_has_a_docstring() -> None:
    names = dict(public())
    assert len(names) > 40
    for name, thing in names.items():
        if inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing):
            doc = thing.__doc__
            assert doc and not doc.startswith(f"{name.rpartition('.')[2]}("), f"{name} has no docstring"


CPP_KERNEL = r"^(?:template.*\n)?(?:__global__.*\n)?\s*(?:void )?(\w+_(?:kernel|tile))\([^;]*?\{"
PY_KERNEL = r"^@triton\.jit.*\n(?:@.*\n)*def (\w+_kernel)\("


def kernels() -> dict[str, str]:
    """By "file: name", the comment of every kernel: it stands above it, above its tile's part, or is its docstring."""
    found: dict[str, str] = {}
    for source in [*CSRC.rglob("*.cpp"), *CSRC.rglob("*.cu"), *(PACKAGE / "backends").rglob("*.py")]:
        text, in_python = source.read_text(), source.suffix == ".py"
        matches = list(re.finditer(PY_KERNEL if in_python else CPP_KERNEL, text, re.MULTILINE))
        wanted = {match[1] for match in matches if match[1].endswith("_kernel")}
        for match in matches:
            name = match[1].removesuffix("_tile").removesuffix("_kernel") + "_kernel"
            before = re.search(r"((?:^(?://|#).*\n)+)\Z", text[: match.start()], re.MULTILINE)
            after = re.match(r"[^\"]*?:\n\s+\"\"\"(.*?)\"\"\"", text[match.end() :], re.DOTALL) if in_python else None
            comment = before[1] if before else after[1] if after else ""
            if name in wanted:
                found[f"{source.name}: {name}"] = found.get(f"{source.name}: {name}") or comment
    return found


def test_kernel_comments_have_their_six_entries() -> None:
    found = kernels()
    assert len(found) >= 5
    for name, comment in found.items():
        lines = [line.lstrip("/# ") for line in comment.splitlines()]
        assert lines and re.search("=| from ", lines[0]), f"{name}: the formula comes first"
        for entry in ("Shapes", "Tiles", "Traffic", "Numerics", "Source"):
            assert any(line.startswith(f"{entry} ") for line in lines), f"{name}: no {entry}"


# ---- fresh processes


def python(code: str) -> str:
    """Run in a process of its own; returns what it printed."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_import_does_no_work() -> None:
    """Nothing optional is imported, no kernel, and none of the libraries that adapters are for."""
    code = """
import sys, torch
before = set(sys.modules)
import resnet_fast
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
print(*(name for name in sys.modules if name.startswith("resnet_fast.backends.") or name == "resnet_fast._C"))
print(torch.get_num_threads() > 0, torch.cuda.is_initialized())
"""
    packages, own, state = python(code).splitlines()
    third_party = set(packages.split()) - set(sys.stdlib_module_names) - {"resnet_fast", "torch"}
    assert not third_party & {"triton", "torchvision", "matplotlib", "timm", "transformers", "numpy", "sklearn", "PIL"}
    assert own == "" and state == "True False"


def test_trains_without_triton_and_without_the_kernels() -> None:
    """The definitions alone: gradients equal plain torch's, and a bottleneck learns."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton" or name == "resnet_fast._C":
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import torch, resnet_fast
from resnet_fast import dispatch
torch.set_num_threads(1)
torch.manual_seed(0)
assert dispatch.choose("affine_act", torch.device("cpu"), torch.float32).backend == "torch"
assert "blocked" in dispatch.reasons("affine_act", torch.device("cpu"), torch.float32)["native"]
block = resnet_fast.Bottleneck(8, 4, stride=2)
x, target = torch.randn(4, 8, 8, 8), torch.rand(4, 16, 4, 4)
grads = []
for forward in (block, block.unfused):
    block.zero_grad()
    (forward(x) - target).square().mean().backward()
    grads.append([p.grad.clone() for p in block.parameters()])
for ours, theirs in zip(*grads):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
optimizer, losses = torch.optim.SGD(block.parameters(), 0.1), []
for _ in range(30):
    optimizer.zero_grad()
    loss = (block(x) - target).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 2, losses
with torch.no_grad():
    torch.testing.assert_close(block.eval()(x), block.unfused(x), rtol=1e-4, atol=1e-4)
print("trained", not any(name.split(".")[0] == "triton" for name in sys.modules))
"""
    assert python(code).split() == ["trained", "True"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.skipif(not list(PACKAGE.glob("_C.*.so")), reason="resnet_fast._C is not built")
def test_one_openmp_runtime() -> None:
    """Two of them would spin against each other."""
    code = """
import resnet_fast, torch, re
from resnet_fast import _C
resnet_fast.ops.bn_stats(torch.ones(2, 64, 32, 32))
(torch.ones(999, 999) @ torch.ones(999, 999)).sum()
maps = open("/proc/self/maps").read()
print(*sorted(set(re.findall(r"\\S*/lib(?:gomp|iomp5|omp)[-.\\w]*\\.so\\S*", maps))))
print(_C.cpu.openmp_info()["runtime"])
"""
    loaded, ours = python(code).splitlines()
    assert len(loaded.split()) == 1, loaded
    assert Path(ours).resolve() == Path(loaded).resolve()
