"""Which backend runs an op, what torch.library knows of the ops, and torch.compile of each."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from resnet_fast import BackendError, dispatch, ops, use_backend
from resnet_fast.dispatch import BACKENDS, OPS, Choice, backend, choose, reasons
from tests.able import needs_native
from tests.cases import TINY, VARIANTS, inputs
from tests.tolerance import assert_same_bits

CPU = torch.device("cpu")
CASE = next(case for case in TINY if case.name == "3x3_2")
every_variant = pytest.mark.parametrize(
    "op, variant", [pytest.param(op, v, id=f"{op}-{v}") for op, variants in VARIANTS.items() for v in variants]
)


def forced() -> str | None:
    return dispatch._forced.get()


@pytest.fixture
def fresh_choices() -> Any:
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


# ---- use_backend


@pytest.mark.parametrize("wrong, hint", [("natvie", "native"), ("cuddn", "cudnn"), ("onednm", "onednn"), ("xyz", None)])
def test_unknown_backend(wrong: str, hint: str | None) -> None:
    with (
        pytest.raises(ValueError, match=f"backend: found '{wrong}'; supported are 'onednn', 'native'") as error,
        use_backend(wrong),
    ):
        pytest.fail("entered")
    assert str(error.value).endswith(f"Did you mean '{hint}'?" if hint else "'torch'.")
    assert forced() is None


def test_forced_backend_never_falls_back() -> None:
    y = torch.ones(1, 2, 3, 3)
    with use_backend("onednn"), pytest.raises(BackendError) as error:
        ops.bn_stats(y)
    message = str(error.value)
    assert "backend 'onednn' cannot run bn_stats on cpu in torch.float32: has no bn_stats." in message
    assert "Able here: " in message and "torch" in message and "Remedy: use_backend(None)" in message
    with use_backend("cudnn"), pytest.raises(BackendError, match=r"device type cpu \(supported: cuda\)"):
        ops.conv_affine_act(**inputs("conv_affine_act", CASE))
    with use_backend("native"), pytest.raises(BackendError):
        ops.bn_stats(y.double())
    assert issubclass(BackendError, RuntimeError)


def test_forced_backend_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one asked for, and no other, is called."""
    called: list[str] = []

    def backend(name: str) -> Any:
        def bn_stats(y: Tensor) -> tuple[Tensor, Tensor]:
            called.append(name)
            return ops.bn_stats.definition(y)

        return SimpleNamespace(why_not=lambda *args: None, bn_stats=bn_stats)

    monkeypatch.setattr(dispatch, "backend", functools.cache(backend))
    dispatch._choose.cache_clear()
    try:
        for name in BACKENDS:
            with use_backend(name):
                ops.bn_stats(torch.ones(1, 2, 3, 3))
        ops.bn_stats(torch.ones(1, 2, 3, 3))
        with use_backend("torch"):
            ops.bn_stats(torch.ones(1, 2, 3, 3))
    finally:
        dispatch._choose.cache_clear()
    assert called == [*BACKENDS, BACKENDS[0]]


def test_nesting_and_exceptions() -> None:
    with use_backend("torch"):
        with use_backend("native"):
            assert forced() == "native"
            with use_backend(None):
                assert forced() is None
            assert forced() == "native"
        assert forced() == "torch"
        with pytest.raises(KeyError), use_backend("native"):
            raise KeyError
        assert forced() == "torch"
    assert forced() is None


def test_threads_do_not_see_each_other() -> None:
    seen: list[str | None] = []

    def other() -> None:
        seen.append(forced())
        with use_backend("native"):
            entered.set()
            leave.wait(10)

    entered, leave = threading.Event(), threading.Event()
    with use_backend("torch"):
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)
        assert forced() == "torch"
        leave.set()
        thread.join()
    assert seen == [None]


# ---- choosing


def test_reasons_and_choice_agree() -> None:
    for op in OPS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            answers = reasons(op, CPU, dtype)
            assert list(answers) == [*BACKENDS, "torch"] and answers["torch"] is None
            assert all(reason is None or (isinstance(reason, str) and reason) for reason in answers.values())
            first = next(name for name, reason in answers.items() if reason is None)
            assert choose(op, CPU, dtype).backend == first
            for name, reason in answers.items():
                with use_backend(name):
                    if reason is None:
                        assert choose(op, CPU, dtype).backend == name
                    else:
                        with pytest.raises(BackendError):
                            choose(op, CPU, dtype)


@needs_native
def test_order_on_a_cpu() -> None:
    assert choose("affine_act", CPU, torch.float32).backend == "native"
    assert choose("affine_act", CPU, torch.float64) == Choice("torch", ops.affine_act.definition)
    assert choose("conv_affine_act", CPU, torch.float32).backend == "onednn"
    assert choose("conv_affine_act", CPU, torch.float16).backend == "native"


def test_choices_are_cached(monkeypatch: pytest.MonkeyPatch, fresh_choices: None) -> None:
    asked: list[str] = []
    original = dispatch._why_not

    def why_not(name: str, op: str, *rest: Any) -> str | None:
        if name == BACKENDS[0]:
            asked.append(op)
        return original(name, op, *rest)

    monkeypatch.setattr(dispatch, "_why_not", why_not)
    for _ in range(3):
        ops.bn_stats(torch.ones(1, 2, 3, 3))
        ops.bn_stats(torch.ones(1, 2, 3, 3).bfloat16())
    assert asked == ["bn_stats", "bn_stats"]  # once per dtype


def test_a_backend_that_cannot_be_imported_is_passed_over(monkeypatch: pytest.MonkeyPatch, fresh_choices: None) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"no {name} here")

    monkeypatch.setattr(dispatch, "backend", missing)
    assert reasons("bn_stats", CPU, torch.float32)["native"] == "cannot be imported: no native here"
    assert choose("bn_stats", CPU, torch.float32).backend == "torch"
    with use_backend("native"), pytest.raises(BackendError, match="cannot be imported: no native here"):
        ops.bn_stats(torch.ones(1, 2, 3, 3))


@needs_native
def test_unknown_devices_have_a_reason() -> None:
    for name in BACKENDS:
        try:
            why = backend(name).why_not("conv_affine_act", torch.device("xpu"), torch.float32)
        except ImportError:  # triton is optional
            continue
        assert why is not None and why.startswith("device type xpu (supported: ")


# ---- torch.library


def test_every_op_is_registered() -> None:
    assert set(OPS) == set(VARIANTS) == {name for name in ops.__all__ if name != "stats_dtype"}
    for name, op in OPS.items():
        schema = str(getattr(torch.ops.resnet_fast, name).default._schema)
        assert schema == str(torch._C.parse_schema(f"resnet_fast::{name}{op.schema}"))
        assert "!" not in schema  # mutates nothing
        assert repr(op) == f"<op resnet_fast::{name}{op.schema}>" and getattr(ops, name) is op


@every_variant
def test_arguments_by_position_and_by_name(op: str, variant: str) -> None:
    kwargs = inputs(op, CASE, variant=variant)
    by_name = OPS[op](**kwargs)
    bound = OPS[op].signature.bind(**kwargs)
    bound.apply_defaults()
    assert_same_bits(OPS[op](*bound.arguments.values()), by_name)
    assert_same_bits(getattr(torch.ops.resnet_fast, op)(**kwargs), by_name)


def layouts(value: Any) -> Any:
    values = (value,) if isinstance(value, Tensor) else value
    return [(tuple(t.shape), t.stride(), t.dtype, t.device.type) for t in values]


@pytest.mark.parametrize("backend", [None, "torch"], ids=["automatic", "torch"])
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_variant
def test_fakes_tell_the_truth(op: str, variant: str, dtype: torch.dtype, layout: str, backend: str | None) -> None:
    """Shapes, strides and dtypes on fake tensors are those of the real outputs."""
    kwargs = inputs(op, CASE, dtype, variant=variant, layout=layout)
    with use_backend(backend):
        real = layouts(OPS[op](**kwargs))
    mode = FakeTensorMode()
    fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    with mode:
        assert layouts(OPS[op](**fakes)) == real


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
@every_variant
def test_opcheck(op: str, variant: str, layout: str) -> None:
    """torch's own checks: schema, fake, autograd registration, and aot_autograd with a dynamic batch."""
    kwargs = inputs(op, CASE, variant=variant, layout=layout)
    torch.library.opcheck(getattr(torch.ops.resnet_fast, op).default, (), kwargs)


@every_variant
def test_compiles_as_one_graph(op: str, variant: str) -> None:
    """torch.compile(fullgraph=True), with a dynamic batch; strides and values as without."""
    torch._dynamo.reset()
    function: Callable[..., Any] = getattr(torch.ops.resnet_fast, op)
    compiled = torch.compile(lambda kwargs: function(**kwargs), fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (11, 13):  # sizes that no other dimension has, or they would be taken for the same one
        kwargs = inputs(op, CASE._replace(N=batch), variant=variant)
        if isinstance(kwargs.get("n"), float):
            kwargs["n"] = 100.0  # numbers are constants of a graph
        expected = function(**kwargs)
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = compiled(kwargs)
        assert layouts(found) == layouts(expected)
        assert_same_bits(found, expected)


def test_autocast_is_off_inside_an_op() -> None:
    """What to cast was decided before the op was called."""
    kwargs = inputs("conv_stats", CASE)
    expected = ops.conv_stats(**kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        for name in ("torch", None):
            with use_backend(name):
                found = ops.conv_stats(**kwargs)
            assert found[0].dtype == torch.float32
            torch.testing.assert_close(found, expected)


@needs_native
@pytest.mark.parametrize(
    "archs, capability, runs",
    [
        (["sm_80", "sm_90", "compute_90"], (8, 0), True),
        (["sm_80", "sm_90", "compute_90"], (8, 9), True),
        (["sm_80", "sm_90", "compute_90"], (10, 0), True),
        (["sm_80", "sm_90", "compute_90"], (7, 5), False),
        (["sm_80"], (9, 0), False),
        (["sm_86"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_90a"], (10, 0), False),
        ([], (9, 0), False),
    ],
)
def test_which_gpus_a_build_serves(archs: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert backend("native").common.runs_on(archs, capability) is runs


@every_variant
def test_arguments_by_name_in_any_order(op: str, variant: str) -> None:
    """With and without autograd, whose absence takes a shorter way."""
    kwargs = inputs(op, CASE, variant=variant)
    expected = OPS[op].definition(**kwargs)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), use_backend("torch"):
            assert_same_bits(OPS[op](**dict(reversed(kwargs.items()))), expected)
    if op in dispatch.SIGNATURES:
        assert dispatch.tuned(op, **dict(reversed(kwargs.items()))) is None
