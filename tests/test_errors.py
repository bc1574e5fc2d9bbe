"""What the public API says to bad input: every message is in errors.txt, and says what is wrong and what is supported.

RESNET_FAST_UPDATE_SNAPSHOTS=1 writes errors.txt anew; read the difference before you commit it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast import functional, ops
from resnet_fast.__main__ import main
from resnet_fast.functional import ConvBn

SNAPSHOT = Path(__file__).with_name("errors.txt")
UPDATE = os.environ.get("RESNET_FAST_UPDATE_SNAPSHOTS") == "1"

#: Every call as its text, by the part of the API that it is about.
CALLS = {
    "fuse, unfuse, explain, fused": """
resnet_fast.fuse("resnet50")
resnet_fast.fuse(None)
resnet_fast.fuse(net(), backend="nativ")
resnet_fast.fuse(net(), backend=1)
resnet_fast.fuse(net(), filter_fn="layer1")
resnet_fast.fuse(nn.Sequential(Odd()), strict=True)
resnet_fast.unfuse("resnet50")
resnet_fast.explain(torch.ones(1))
resnet_fast.fused("resnet50").__enter__()
torch.jit.script(resnet_fast.fuse(net()))
""",
    "register_block and plans": """
resnet_fast.register_block("Block", print)
resnet_fast.register_block(nn.Module(), print)
resnet_fast.register_block(Odd, "plan")
resnet_fast.BlockPlan("mine", (resnet_fast.ConvBnPath("a", "b"),), "side")
""",
    "use_backend": """
resnet_fast.use_backend("tritn").__enter__()
resnet_fast.use_backend("").__enter__()
forced("cudnn")
""",
    "ConvBnAct2d": """
ConvBnAct2d("8", 4, 3)
ConvBnAct2d(8, 0, 3)
ConvBnAct2d(8, 4, (3, 3))
ConvBnAct2d(8, 4, 3, stride=0)
ConvBnAct2d(8, 4, 3, padding="same")
ConvBnAct2d(8, 4, 3, dilation=1.5)
ConvBnAct2d(8, 4, 3, groups=3)
ConvBnAct2d(8, 4, 3, eps=-1)
ConvBnAct2d(8, 4, 3, momentum="0.1")
ConvBnAct2d.from_modules(nn.Linear(2, 2), nn.BatchNorm2d(2))
ConvBnAct2d.from_modules(nn.Conv2d(2, 2, 1), None)
""",
    "BasicBlock, Bottleneck, Stem": """
BasicBlock(8, 2.5)
BasicBlock(8, 8, 0)
BasicBlock(-1, 8)
Bottleneck(8, None)
Bottleneck(8, 2, version="v2")
Bottleneck.from_modules(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
BasicBlock.from_modules(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
Stem("3")
Stem(3, 0)
Stem.from_modules(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1))
""",
    "functional": """
conv_bn_act("x", layer())
conv_bn_act(x[0], layer())
conv_bn_act(x.long(), layer())
conv_bn_act(x.double(), layer())
conv_bn_act(x.to("meta"), layer())
conv_bn_act(x, nn.Conv2d(8, 4, 1))
conv_bn_act(x[:, :3], layer())
conv_bn_act(x, layer(weight=w[0]))
conv_bn_act(x, layer(gamma=torch.ones(3)))
conv_bn_act(x, layer(beta=0.5))
conv_bn_act(x, layer(running_mean=torch.ones(3), running_var=torch.ones(4)))
conv_bn_act(x, layer(bias=torch.ones(5)))
conv_bn_act(x, layer(stride=2))
conv_bn_act(x, layer(stride=(0, 1)))
conv_bn_act(x, layer(groups=3))
conv_bn_act(x, layer(batch_stats=False))
conv_bn_act(x[:1, :, :1, :1], layer(padding=(1, 1)))
residual_block(x, [])
residual_block(x, layer())
residual_block(x, [layer(), layer()])
residual_block(x, [layer()], identity=True)
residual_block(x, [layer()], identity=True, residual=x)
residual_block(x, [layer()], residual="x")
residual_block(x, [layer()], residual=torch.ones(2, 5, 4, 4))
residual_block(x, [layer()], projection=nn.Conv2d(8, 4, 1))
residual_block(x, [layer()], projection=layer(weight=torch.ones(5, 8, 1, 1), gamma=None, beta=None))
residual_block(x, [layer(relu=False)], pool=True)
""",
    "models": """
models.create("resnet51")
models.resnet50(shortcut="D")
models.macs(net(), (3, 0, 32))
""",
    "command line": """
command("benhc")
command("bench", "--modle", "resnet18")
command("bench", "--model", "resnet51")
command("bench", "--model", "torchvison:resnet50")
command("bench", "--model", "tests.test_errors:nothing")
command("bench", "--dtype", "float33")
command("bench", "--mode", "train")
command("bench", "--batch", "0")
command("bench", "--batch", "eight")
command("bench", "--against", "eagre")
command("bench", "--device", "tpu")
command("bench", "--images", "/no/such/folder")
command("bench", "--size", "-1")
command("info", "--jsn")
""",
}

#: Messages that are torch's own, kept word for word: what a user of the unfused block would read.
TORCHS = ("Expected more than 1 value per channel",)


class Odd(nn.Module):
    """A class with an adapter that refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def forced(name: str) -> None:
    x = torch.ones(1, 2, 3, 3)
    with resnet_fast.use_backend(name):
        ops.bn_stats(x)


class CommandFailed(Exception):
    """A command that did not exit with 0; the message is what it printed."""


def command(*arguments: str) -> None:
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        status = main(arguments)
    if status:
        raise CommandFailed(f"exit {status}: {err.getvalue().strip().splitlines()[-1]}")


def namespace() -> dict[str, Any]:
    w = torch.ones(4, 8, 3, 3)

    def layer(**fields: Any) -> ConvBn:
        return ConvBn(**{"weight": w, "gamma": torch.ones(4), "beta": torch.zeros(4), **fields})

    public = {n: getattr(m, n) for m in (resnet_fast, functional) for n in m.__all__}
    return {**globals(), **public, "x": torch.ones(2, 8, 6, 6), "w": w, "layer": layer}


def said(call: str) -> str:
    """Class and message; what depends on the machine is left out."""
    try:
        eval(call, namespace())
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    else:
        return "nothing"
    text = re.sub(r"Able here: [^.]*\.", "Able here: ...", text)
    text = re.sub(r"choose from [^)]*", "choose from ...", text)
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def taken() -> dict[str, dict[str, str]]:
    resnet_fast.register_block(Odd, lambda block: "not on a Saturday")
    return {part: {call: said(call) for call in calls.strip().splitlines()} for part, calls in CALLS.items()}


def written(parts: dict[str, dict[str, str]]) -> str:
    lines = []
    for part, calls in parts.items():
        lines.append(f"# {part}\n")
        for call, text in calls.items():
            lines.append(f"{call}\n" + "".join(f"    {line}\n" for line in text.splitlines()))
        lines.append("\n")
    return "".join(lines).rstrip() + "\n"


def read(text: str) -> dict[str, str]:
    """Call -> message, of a snapshot."""
    found: dict[str, str] = {}
    call = ""
    for line in text.splitlines():
        if line.startswith("    "):
            found[call] = f"{found[call]}\n{line[4:]}".strip()
        elif line and not line.startswith("#"):
            call = line
            found[call] = ""
    return found


@pytest.fixture(scope="module")
def messages() -> dict[str, str]:
    parts = taken()
    if UPDATE:
        SNAPSHOT.write_text(written(parts))
    return {call: text for calls in parts.values() for call, text in calls.items()}


def test_snapshot(messages: dict[str, str]) -> None:
    expected = read(SNAPSHOT.read_text())
    assert messages.keys() == expected.keys(), "RESNET_FAST_UPDATE_SNAPSHOTS=1 takes new calls up"
    different = [f"{c}\n  was {expected[c]}\n  is  {messages[c]}" for c in messages if messages[c] != expected[c]]
    assert not different, "\n".join(different)


def test_every_message_says_what_is_supported(messages: dict[str, str]) -> None:
    """The argument, what was found, and what is supported or the remedy; nothing bare, nothing of Python's inside."""
    for call, text in messages.items():
        assert text != "nothing", f"{call} raises nothing"
        if any(words in text for words in TORCHS):
            continue
        assert re.search(r"found|invalid choice|unrecognized|cannot|not |no |supported", text), f"{call}: {text}"
        helps = r"support|expected|Remedy|Did you mean|choose from|needed|takes|strict=True|no such folder|has no \w+"
        assert re.search(helps, text), f"{call}: {text}"
        assert "object has no attribute" not in text and "NoneType' object" not in text, f"{call}: {text}"
