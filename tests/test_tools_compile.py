"""After fuse(): torch.compile, torch.export, ONNX, tracing, scripting and FX see the original, and lose nothing."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fast
from tests.tools import FUSED, assert_same_state, fused_rows, images, loss_of, near, pair


def compiled(model: nn.Module, backend: str = "aot_eager") -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # reset() leaves what other tests have counted
    return torch.compile(model, fullgraph=True, dynamic=True, backend=backend)


def test_compile_eval_with_dynamic_batch() -> None:
    plain, ours = pair(train=False)
    fast = compiled(ours)
    with torch.no_grad():
        for n in (2, 3, 7):
            near(fast(images(n)), plain(images(n)), f"batch {n}")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert fused_rows(ours) == FUSED, "what is not compiled stays fused"


def test_compile_training_with_dynamic_batch() -> None:
    """Forward, gradients and running statistics; then the same model uncompiled, and back to eval."""
    plain, ours = pair()
    fast = compiled(ours)
    for n in (2, 3, 5):
        for model, call in ((plain, plain), (ours, fast)):
            model.zero_grad()
            loss_of(call, images(n)).backward()
        assert_same_state(ours, plain)
    for model in (plain, ours):
        model.zero_grad()
        loss_of(model, images(4)).backward()
    assert_same_state(ours, plain)
    near(ours.eval()(images()), plain.eval()(images()))


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    plain, ours = pair()
    fast = compiled(ours.layer1, "inductor")
    x = torch.randn(2, 8, 10, 10)
    loss_of(plain.layer1, x).backward()
    loss_of(fast, x).backward()
    assert_same_state(ours.layer1, plain.layer1)


def test_fuse_after_compile() -> None:
    """fuse(compiled) swaps the blocks inside; the graph is compiled anew, of the originals."""
    plain, _ = pair(train=False)
    ours = copy.deepcopy(plain)
    fast = compiled(ours)
    with torch.no_grad():
        expected = fast(images())
        resnet_fast.fuse(fast)
        assert fused_rows(ours) == FUSED
        near(fast(images()), expected)
        near(ours(images()), expected)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_export_with_dynamic_batch(train: bool) -> None:
    plain, ours = pair(train)
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(ours, (images(),), dynamic_shapes=shapes)
    assert not any("resnet_fast" in str(node.target) for node in program.graph.nodes)
    keys = {k.removeprefix("_orig_mod.") for k in program.state_dict}
    assert keys == set(plain.state_dict())
    module = program.module()
    for n in (2, 6):
        near(module(images(n)), plain(images(n)), f"batch {n}")
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    near(torch.export.load(file).module()(images(3)), module(images(3)))


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_onnx(fused: bool) -> None:
    """A fused model exports as it is, to the file that the original gives."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    plain, ours = pair(train=False)
    if not fused:
        resnet_fast.unfuse(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        mine, theirs = (torch.onnx.export(m, (images(),), dynamo=True, verbose=False) for m in (ours, plain))
    ops = [[node.op_type for node in p.model_proto.graph.node] for p in (mine, theirs)]
    assert ops[0] == ops[1] and "Conv" in ops[0]
    onnx.checker.check_model(mine.model_proto)
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator(mine.model_proto)
    (out,) = evaluator.run(None, {mine.model_proto.graph.input[0].name: images().numpy()})
    near(torch.from_numpy(out.copy()), plain(images()))


def test_trace() -> None:
    plain, ours = pair(train=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(ours, images())
    near(traced(images(3)), plain(images(3)))
    assert {n.kind().partition("::")[0] for n in traced.inlined_graph.nodes()} == {"prim", "aten"}


def test_script_says_what_to_do() -> None:
    """torch.jit.script reads a forward's text; of a fused block it asks for unfuse(), which then works."""
    plain, ours = pair(train=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(resnet_fast.FuseError, match=r"torch\.jit\.script.*unfuse"):
            torch.jit.script(ours)
        assert fused_rows(ours) == FUSED
        scripted = torch.jit.script(resnet_fast.unfuse(ours))
    near(scripted(images()), plain(images()))


def test_fx() -> None:
    """symbolic_trace takes the fused blocks for what they inherit from."""
    plain, ours = pair(train=False)
    graph = torch.fx.symbolic_trace(ours)
    near(graph(images()), plain(images()))
    assert {n.op for n in graph.graph.nodes} >= {"call_module"}


def test_module_compile_of_one_block() -> None:
    """A block that was compiled as a part of the model runs beside fused ones."""
    plain, ours = pair(train=False)
    torch._dynamo.reset()
    ours.layer1[0].compile(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        near(ours(images()), plain(images()))


def test_flop_counter_and_modes_see_torchs_ops() -> None:
    """torch.utils.flop_counter counts the convolutions of a fused training step, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in pair():
        with FlopCounterMode(display=False) as counter:
            loss_of(model, images()).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_make_fx() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    plain, ours = pair(train=False)
    x: Tensor = images()
    with torch.no_grad():
        graph = make_fx(lambda t: ours(t))(x)
        near(graph(x + 1), plain(x + 1))
