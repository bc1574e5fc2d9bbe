"""capture(): a model's inference as a CUDA graph, replayed with one call to the driver instead of hundreds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

__all__ = ["Captured", "capture"]

#: Forwards before the capture: Triton compiles, cuDNN and the allocator settle.
_WARM_UP = 3


class _Graph(NamedTuple):
    """One captured shape: its buffers, and what runs it."""

    x: Tensor
    output: Any
    graph: torch.cuda.CUDAGraph


def _key(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.dtype, x.device


def _describe(key: tuple[Any, ...]) -> str:
    shape, dtype, device = key
    return f"{shape} {str(dtype).removeprefix('torch.')} on {device}"


class Captured:
    """What :func:`capture` returns: call it as the model. Made by capture(), not by hand."""

    def __init__(self, model: nn.Module, graphs: dict[tuple[Any, ...], _Graph], clone: bool) -> None:
        self.model = model
        self._graphs, self._clone = graphs, clone
        # What the graphs read by its address. Held, so that the addresses stay theirs.
        self._homes = [
            (home, tuple(home.values()))
            for m in model.modules()
            for home in (m._modules, m._parameters, m._buffers)
            if home
        ]
        tensors = [t for _, values in self._homes for t in values if isinstance(t, Tensor)]
        self._addresses = [(t, t.data_ptr()) for t in tensors]

    @property
    def inputs(self) -> list[str]:
        """The inputs there are graphs for, in words."""
        return [_describe(key) for key in self._graphs]

    def _changed(self) -> bool:
        """Whether a tensor or module was replaced since. New values in the same tensors are no change."""
        same = all(
            len(home) == len(values) and all(map(is_, home.values(), values)) for home, values in self._homes
        ) and all(t.data_ptr() == address for t, address in self._addresses)
        return not same

    def __call__(self, x: Tensor) -> Any:
        """The model's output for ``x``: unless made with ``clone=True`` in buffers that the next call with its shape
        writes over.

        Raises ``ValueError`` for an input of another shape, dtype or device than those captured, and ``RuntimeError``
        if ``x`` needs a gradient, or if the model was put into training mode or its tensors were replaced.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x: found {type(x).__name__}, supported is torch.Tensor")
        graph = self._graphs.get(_key(x))
        if graph is None:
            raise ValueError(
                f"x: found {_describe(_key(x))}, captured are {'; '.join(self.inputs)}. "
                "Remedy: capture(model, [example, ...]) with an example of each, or call the model itself"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "x: found requires_grad=True, and a captured model has no backward. "
                "Remedy: x.detach(), or torch.no_grad(), or call the model itself"
            )
        if self.model.training:
            raise RuntimeError("model: found training mode, captured in eval. Remedy: model.eval(), or call the model")
        with torch.no_grad():
            graph.x.copy_(x)
        graph.graph.replay()
        if self._changed():  # looked at while the GPU works
            raise RuntimeError(
                "model: a parameter, buffer or submodule was replaced after the capture (by .to(), by assignment, by "
                "fuse()), and the graph reads the old one. Remedy: capture(model, example) again. Changes in place, as "
                "load_state_dict and optimizers make them, are seen"
            )
        return tree_map_only(Tensor, Tensor.clone, graph.output) if self._clone else graph.output


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: found {type(model).__name__}, supported is torch.nn.Module")
    training = [name or "(root)" for name, m in model.named_modules() if m.training]
    if training:
        raise ValueError(
            f"model: found training mode in {', '.join(training[:3])}{', ...' if len(training) > 3 else ''}; supported "
            "is eval: a graph would repeat one step's random numbers and statistics. Remedy: model.eval()"
        )


def _check_examples(model: nn.Module, examples: Sequence[Any]) -> None:
    if not examples:
        raise ValueError("example_input: found no tensor, supported are a tensor and a list of them")
    for x in examples:
        if not isinstance(x, Tensor):
            raise TypeError(f"example_input: found {type(x).__name__}, supported are a tensor and a list of them")
        if x.device.type != "cuda":
            raise ValueError(
                f"example_input: found device {x.device}, supported is cuda: only there are CUDA graphs. "
                "Remedy: call the model itself"
            )
        if x.requires_grad:
            raise ValueError(
                "example_input: found requires_grad=True, and a captured model has no backward. Remedy: x.detach()"
            )
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            if t.device != x.device:
                raise ValueError(
                    f"example_input: found device {x.device}, and {name} is on {t.device}. Remedy: model.to(x.device)"
                )


@contextlib.contextmanager
def _uncached_autocast() -> Iterator[None]:
    """The autocast around the caller, without its cache of cast weights: a graph must cast those of its own time."""
    with torch.autocast(
        "cuda",
        dtype=torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        cache_enabled=False,
    ):
        yield


def _record(model: nn.Module, example: Tensor, stream: torch.cuda.Stream, pool: Any) -> _Graph:
    """Warm up on a side stream, and capture one forward on ``stream``. ``pool``: whose memory to share, or None."""
    # A buffer made in inference mode could not be written outside of it.
    with torch.inference_mode(False), torch.cuda.device(example.device), torch.no_grad(), _uncached_autocast():
        x = example.clone(memory_format=torch.preserve_format)
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                model(x)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # A capture that fails would leave the stream it ran on the current one.
            with torch.cuda.stream(current), torch.cuda.graph(graph, pool=pool, stream=stream):
                output = model(x)
        except RuntimeError as error:
            # The end of a capture that failed says no more than that it did: what failed came before.
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            raise RuntimeError(
                f"model: its forward on {_describe(_key(x))} cannot be captured ({str(cause).splitlines()[0]}): it "
                "waits for the GPU, or reads a tensor's value. Remedy: call the model itself"
            ) from error
    return _Graph(x, output, graph)


def capture(model: nn.Module, example_input: Tensor | Sequence[Tensor], *, clone: bool = False) -> Captured:
    """A callable that replays ``model``'s forward as a CUDA graph, for inputs like ``example_input``.

    Args:
        model: in eval mode, on one GPU, called with one tensor; best fused and channels-last. Its state is not changed.
        example_input: a CUDA tensor, or a list of them: for each shape and dtype a graph of its own. Its values do not
            matter; its layout is the one in which inputs are kept.
        clone: return copies, and let graphs share their memory. Otherwise every graph has memory of its own, and
            outputs lie in buffers that the next call with that shape writes over.

    Autocast is as it is around this call. Weights may be changed in place afterwards, not replaced. Raises
    ``TypeError`` and ``ValueError`` for what cannot be captured: training mode, a CPU tensor, gradients; and
    ``RuntimeError`` where the forward waits for the GPU or reads a tensor's value.
    """
    _check_model(model)
    examples = [example_input] if isinstance(example_input, Tensor) else list(example_input)
    _check_examples(model, examples)
    graphs: dict[tuple[Any, ...], _Graph] = {}
    # In memory that graphs share, one writes over what another has left in its outputs: these must be copied first.
    pool = torch.cuda.graph_pool_handle() if clone else None
    # torch.cuda.graph's own stream is one of the GPU that captured first; and memory is shared within a stream.
    stream = torch.cuda.Stream(examples[0].device)
    for example in examples:
        if _key(example) not in graphs:
            graphs[_key(example)] = _record(model, example, stream, pool)
    return Captured(model, graphs, clone)
