"""One residual block, forward and backward, on the ops; and relu(x + residual).

A residual block is one ``autograd.Function`` around the ops. Its forward saves the block's input, the convolution
outputs y, the per-channel statistics, and one bit per value of the block's output; no activation is kept. Between the
layers only lazy activations (y, scale, shift) and lazy gradients (dz, y, mean, a, b, c) are passed: whether they are
written to memory is the backend's affair. Its backward forms the masks inside the block again from y, scale and shift.

Arguments have been checked by ``functional``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd.function import once_differentiable

from . import ops
from .dispatch import direct, forced_backend, fused_sums, hook, tuned, use_backend
from .layers import ConvBn, Moves, scale_shift, unit, update_at_once, update_running

__all__ = [
    "AddRelu",
    "Block",
    "Static",
    "each_gradient",
    "forward_block",
]


class Static(NamedTuple):
    """What the block's Function must know besides its tensors. One entry per layer, the projection last."""

    geometry: list[tuple[list[int], list[int], list[int], int]]
    eps: list[float]
    relu: list[bool]
    batch_stats: list[bool]
    group: list[Any]
    projection: bool  # the last layer is the shortcut's; it reads x
    identity: bool  # the residual is x itself
    pool: bool  # the 3x3/2 max-pool follows
    running: Sequence[ConvBn] | None = None  # whose running statistics the forward updates; None: its caller does
    moves: Moves | None = None  # what that comes to, where it is known beforehand

    def conv(self, i: int) -> tuple[list[int], list[int], list[int], int]:
        """Trailing arguments of layer i's convolution ops."""
        return self.geometry[i]

    @property
    def end(self) -> int:
        """The last layer of the main path."""
        return len(self.geometry) - self.projection - 1


#: Tensors per layer in the Function's flat argument list: weight, gamma, beta, and the running mean and var.
_PER_LAYER = 5


class _Layer(NamedTuple):
    """What the backward of one layer needs of its forward; all but w and y are (K,)."""

    w: Tensor
    y: Tensor
    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor
    total: Tensor | None = None  # (), values per channel over all ranks, where the statistics are theirs

    def operand(self, relu: bool, run: Any = ops) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The activation as a convolution takes it: lazy where it can be, else written out."""
        if relu:
            return self.y, self.scale, self.shift
        return run.affine_act(self.y, self.scale, self.shift, relu=False), None, None


def _values(y: Tensor) -> int:
    """Values per channel of y (N, K, P, Q)."""
    return y.numel() // y.shape[1] if y.shape[1] else 0


def _gather(group: Any, n: int, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """n (T,), mean (T, K) and var (T, K) of the T ranks of ``group``, in their order: the same on every rank."""
    own = torch.cat((mean, var, mean.new_full((1,), n)))
    world = dist.get_world_size(group)
    if dist.get_backend(group) == "gloo":
        parts = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(parts, own, group)
        every = torch.stack(parts)
    else:
        every = own.new_empty(world, own.numel())
        dist.all_gather_into_tensor(every, own, group)
    k = mean.numel()
    return every[:, -1], every[:, :k], every[:, k:-1]


def _forward_layer(
    run: Any,
    static: Static,
    i: int,
    operand: tuple[Tensor, Tensor | None, Tensor | None],
    tensors: Sequence[Tensor | None],
    keep: bool,
) -> tuple[_Layer, tuple[Tensor, Tensor]]:
    """y = conv(operand) and the affine that its statistics make. Returns the layer, and mean and unbiased var.

    ``run``: the ops, or what they come to (``dispatch.direct``). ``keep``: there will be a backward.
    """
    w, gamma, beta, mean, var = tensors[_PER_LAYER * i : _PER_LAYER * (i + 1)]
    assert w is not None
    x, *lazy = operand
    if not static.batch_stats[i]:
        assert mean is not None and var is not None
        if lazy[0] is not None:
            x = run.affine_act(x, *lazy)
        y = F.conv2d(x, w, None, *static.conv(i)).contiguous(memory_format=torch.channels_last)
        nothing = mean.new_empty(0), var.new_empty(0)
        if keep:  # backward is of these statistics, whatever has become of the running ones by then
            mean = mean.clone()
        return _Layer(w, y, mean, *scale_shift(mean, var, gamma, beta, static.eps[i])), nothing
    norm = gamma, beta, static.eps[i]
    y, mean, var, rstd, scale, shift = run.conv_stats(x, w, *static.conv(i), *lazy, *norm)
    total = None
    if static.group[i] is not None:
        n, means, variances = _gather(static.group[i], _values(y), mean, var)
        mean, var, rstd, scale, shift = run.bn_finalize(n, means, variances, *norm)
        total = n.sum()
    elif _values(y) == 1:  # nn.BatchNorm2d's own rule, in its own words
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.shape}")
    return _Layer(w, y, mean, rstd, scale, shift, total), (mean, var)


def forward_block(
    static: Static, x: Tensor, residual: Tensor | None, tensors: Sequence[Tensor | None], keep: bool, run: Any = ops
) -> tuple[Tensor, Tensor | None, list[_Layer], list[Tensor]]:
    """z, what its backward will need of it, the layers, and their statistics flat: mean, unbiased var, mean, ...

    Statistics are empty where they were given. ``keep``: there will be a backward; it needs the pooling's index, or
    the bits of the ReLU behind a sum. Without a sum those follow from y. ``run``: the ops, or what they come to.
    """
    end = static.end
    layers: list[_Layer] = []
    statistics: list[Tensor] = []
    first = operand = x, None, None
    for i in range(len(static.geometry)):
        layer, stats = _forward_layer(run, static, i, first if i > end else operand, tensors, keep)
        layers.append(layer)
        statistics += stats
        if i < end:
            operand = layer.operand(static.relu[i], run)  # type: ignore[assignment]
    last, relu = layers[end], static.relu[end]
    affine = last.y, last.scale, last.shift
    if static.pool:
        z, kept = run.affine_act_maxpool(*affine)
        return z, kept, layers, statistics
    shortcut: tuple[Tensor | None, ...] = (x,) if static.identity else (residual,)
    if static.projection:
        shortcut = layers[-1].y, layers[-1].scale, layers[-1].shift
    if keep and relu and shortcut[0] is not None:
        z, kept = run.affine_act_mask(*affine, *shortcut)
        return z, kept, layers, statistics
    return run.affine_act(*affine, *shortcut, relu=relu), None, layers, statistics


def _conv_backward(
    run: Any, g: Tensor, *args: Any, residual: Tensor | None, disposable: bool, **lazy: Any
) -> tuple[Tensor, Tensor]:
    """``ops.conv_backward``. ``residual``, and ``g`` if ``disposable``, may be written over where the backend can."""
    if (residual is not None or disposable) and not torch.compiler.is_compiling():
        choice = tuned("conv_backward", g, *args, **lazy, residual=residual)
        into = hook("conv_backward", "into", g.device, g.dtype, choice)
        if into is not None:
            return into(g, *args, **lazy, residual=residual, disposable=disposable)
    return run.conv_backward(g, *args, **lazy, residual=residual)


class _Backward:
    """The backward pass of one block: the state that its layers share."""

    def __init__(
        self, static: Static, x: Tensor, layers: list[_Layer], needs: Sequence[Sequence[bool]], run: Any
    ) -> None:
        self.static, self.x, self.layers, self.needs, self.run = static, x, layers, needs, run
        self.grads: list[Tensor | None] = [None] * (_PER_LAYER * len(layers))

    def mask(self, i: int) -> tuple[Tensor, Tensor] | tuple[()]:
        """scale and shift, from which the ops form the mask of the ReLU behind layer i; nothing without a ReLU."""
        return (self.layers[i].scale, self.layers[i].shift) if self.static.relu[i] else ()

    def needs_sums(self, i: int) -> bool:
        """Whether anything depends on the sums of layer i."""
        _, gamma, beta = self.needs[i]
        return gamma or beta or self.static.batch_stats[i]

    def coefficients(self, i: int, sums: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """a, b, c of layer i's lazy gradient; the gradients of its gamma and beta go into ``grads``."""
        layer, (_, gamma, beta) = self.layers[i], self.needs[i]
        a = layer.scale
        if sums is None:
            zero = torch.zeros_like(a)
            return a, zero, zero
        sum_g, sum_gy = sums
        if layer.total is None:
            b, c, dgamma = self.run.bn_backward_finalize(sum_g, sum_gy, layer.rstd, a, float(_values(layer.y)))
        else:
            # gamma's and beta's gradients are this rank's: whoever averages gradients over ranks averages them too.
            every = torch.stack((sum_g, sum_gy))
            dist.all_reduce(every, group=self.static.group[i])
            every /= layer.total.clamp(min=1)
            b, c, _ = self.run.bn_backward_finalize(every[0], every[1], layer.rstd, a, 1.0)
            dgamma = sum_gy * layer.rstd
        if not self.static.batch_stats[i]:
            b = c = torch.zeros_like(a)
        self.grads[_PER_LAYER * i + 1] = dgamma if gamma else None
        self.grads[_PER_LAYER * i + 2] = sum_g if beta else None
        return a, b, c

    def layer(
        self,
        i: int,
        dz: Tensor,
        mask: Sequence[Tensor],
        sums: tuple[Tensor, Tensor] | None,
        before: int | None,
        needs_x: bool,
        residual: Tensor | None = None,
        index: Tensor | None = None,
    ) -> tuple[Tensor, Sequence[Tensor], tuple[Tensor, Tensor] | None]:
        """Layer i's gradients into ``grads``; returns its input's, with ``residual`` added, which may be overwritten.

        ``dz`` behind the ReLU of ``mask``, or behind the pooling that ``index`` is of. ``before``: the layer it reads,
        None for x. Where ``needs_x`` is False the gradient returned has no elements. Beside it the mask that it still
        needs, and the sums, of the layer before.
        """
        layer, needs_w = self.layers[i], self.needs[i][0]
        lazy: tuple[Tensor, ...] = (layer.y, layer.mean, *self.coefficients(i, sums))
        if index is not None:
            dz, lazy = self.run.maxpool_backward_apply(dz, index, *lazy), ()
        gradient = dict(zip(("y", "mean", "a", "b", "c", "gscale", "gshift"), (*lazy, *mask), strict=False))
        if not (needs_x or needs_w):
            return dz.new_empty(0), (), None
        if before is None:
            dx = self._convolution(i, dz, gradient, (self.x, None, None), needs_x, residual)
            return dx, (), None
        previous, relu = self.layers[before], self.static.relu[before]
        fused = None
        if needs_x and relu and not mask and self.needs_sums(before) and not torch.compiler.is_compiling():
            affine = previous.mean, previous.scale, previous.shift
            arguments = dz, previous.y, layer.w, *self.static.conv(i), needs_w, *affine
            fused = fused_sums(*arguments, **gradient)
        if fused is not None:
            dx, dw, *both = fused(*arguments, **gradient)
            if needs_w:
                self.grads[_PER_LAYER * i] = dw
            return dx, (), (both[0], both[1])
        # For dx alone its size is all that is needed.
        operand = previous.operand(relu, self.run) if needs_w else (previous.y, None, None)
        dx = self._convolution(i, dz, gradient, operand, needs_x, residual)
        if not needs_x:
            return dx, (), None
        mask, sums = self.mask(before), None
        if self.needs_sums(before):
            sums = self.run.bn_backward_sums(dx, previous.y, previous.mean, *mask)
        return dx, mask, sums

    def _convolution(
        self,
        i: int,
        dz: Tensor,
        gradient: dict[str, Tensor],
        operand: tuple[Tensor, Tensor | None, Tensor | None],
        needs_x: bool,
        residual: Tensor | None,
    ) -> Tensor:
        """Layer i's convolution: dw into ``grads``; returns dx."""
        x, scale, shift = operand
        w, needs_w = self.layers[i].w, self.needs[i][0]
        dx, dw = _conv_backward(
            self.run,
            dz,
            x,
            w,
            *self.static.conv(i),
            needs_x,
            needs_w,
            scale=scale,
            shift=shift,
            **gradient,
            residual=residual,
            disposable=i < self.static.end,  # there it comes from the convolution behind, and nobody else has it
        )
        if needs_w:
            self.grads[_PER_LAYER * i] = dw
        return dx


Backward = TypeVar("Backward", bound=Callable[..., Any])


def each_gradient(backward: Backward) -> Backward:
    """``backward`` of a batch of gradients, too, one by one: they come in torch.vmap around torch.autograd.grad, and
    with its ``is_grads_batched``.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, dz: Tensor, *further: Any) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, dz, *further)
        wrap: Callable[[Tensor, int, int], Tensor]
        if functorch.is_batchedtensor(dz):
            level, dim = functorch.maybe_get_level(dz), functorch.maybe_get_bdim(dz)
            batch, wrap = functorch.get_unwrapped(dz).movedim(dim, 0), functorch._add_batch_dim
        elif functorch.is_legacy_batchedtensor(dz):
            level = torch._C._vmapmode_increment_nesting() - 1
            torch._C._vmapmode_decrement_nesting()
            if level < 1:  # autograd's thread for a GPU does not know
                raise RuntimeError("is_grads_batched: found True on a GPU, supported are torch.vmap and a loop")
            batch, wrap = torch._remove_batch_dim(dz, level, 1, 0), torch._add_batch_dim
        else:
            with torch._C._DisableFuncTorch():
                return backward(ctx, dz, *further)
        found = [wrapper(ctx, each, *further) for each in batch.unbind()]
        every = [None if parts[0] is None else torch.stack(parts) for parts in zip(*found, strict=True)]
        return tuple(None if t is None else wrap(t, 0, level) for t in every)

    return cast("Backward", wrapper)


class Block(torch.autograd.Function):
    """z = act(bn(conv(... relu(bn(conv(x))) ...)) + shortcut); where nothing is updated, each layer's mean and var too.

    Where the compiler reads, running statistics are updated outside. Elsewhere inside: checkpointing stops its second
    forward at the last tensor saved, which is when this one's returns, and a batch norm of torch has moved by then.
    """

    @staticmethod
    def forward(
        ctx: Any, static: Static, x: Tensor, residual: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        run = (None if torch.compiler.is_compiling() else direct(x, tensors)) or ops
        z, kept, layers, statistics = forward_block(static, x, residual, tensors, True, run)
        ctx.static, ctx.backend = static, forced_backend()
        ctx.save_for_backward(x, kept, *(t for layer in layers for t in layer))
        if static.running is not None:
            if run is ops or not update_at_once(static.moves, x, statistics):
                update_running(static.running, statistics, empty=x.numel() == 0)
            return (z,)
        ctx.mark_non_differentiable(*statistics)
        return (z, *statistics)

    @staticmethod
    @once_differentiable
    @each_gradient
    def backward(ctx: Any, dz: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.backend is None:
            return Block._backward(ctx, dz)
        # On a GPU this runs in autograd's own threads, which know nothing of the forward's use_backend.
        with use_backend(ctx.backend):
            return Block._backward(ctx, dz)

    @staticmethod
    def _backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        static: Static = ctx.static
        x, kept, *saved = ctx.saved_tensors
        size = len(_Layer._fields)
        layers = [_Layer(*saved[i : i + size]) for i in range(0, len(saved), size)]
        needs_x, needs_residual = ctx.needs_input_grad[1:3]
        flags = ctx.needs_input_grad[3:]
        needs = [flags[i : i + 3] for i in range(0, len(flags), _PER_LAYER)]  # of weight, gamma, beta
        run = (None if torch.compiler.is_compiling() else direct(x, (dz, *saved))) or ops
        block = _Backward(static, x, layers, needs, run)
        end = static.end
        side = layers[-1] if static.projection else None

        # The block's end: g, and the sums of its batch norms.
        last = layers[end]
        mask: Sequence[Tensor] = ()
        index: Tensor | None = None
        sums: tuple[Tensor, Tensor] | None = None
        side_sums: tuple[Tensor, Tensor] | None = None
        if static.pool:
            g, index = dz.contiguous(memory_format=torch.channels_last), kept
            if block.needs_sums(end):
                sums = run.maxpool_backward_sums(g, index, last.y, last.mean)
        elif kept is not None:
            g, sum_g, sum_gy, sum_gr = run.affine_act_backward(
                dz, kept, last.y, last.mean, side.y if side else None, side.mean if side else None
            )
            sums = (sum_g, sum_gy) if block.needs_sums(end) else None
            side_sums = (sum_g, sum_gr) if side and block.needs_sums(end + 1) else None
        else:
            g, mask = dz.contiguous(memory_format=torch.channels_last), block.mask(end)
            if block.needs_sums(end):
                sums = run.bn_backward_sums(g, last.y, last.mean, *mask)
            if side and block.needs_sums(end + 1):
                side_sums = run.bn_backward_sums(g, side.y, side.mean)

        dx: Tensor | None = None
        dz = g
        for i in range(end, -1, -1):
            upstream = needs_x or any(any(n) for n in needs[:i])
            if not upstream and not any(needs[i]):
                break
            # An identity's gradient is g, which after the first layer's backward nobody needs. Without a ReLU's mask it
            # is the gradient that came in, which may be somebody else's, too.
            own = kept is not None and not needs_residual
            residual = g if i == 0 and static.identity and needs_x and end > 0 and own else None
            before = i - 1 if i else None
            dz, mask, sums = block.layer(i, dz, mask, sums, before, upstream, residual, index)
            index = None
            if not upstream:
                break
            if before is None:
                dx = dz
                if static.identity and residual is None:
                    dx = dx + g

        if side and (needs_x or any(needs[-1])):
            side_dx, _, _ = block.layer(end + 1, g, (), side_sums, None, needs_x, dx)
            dx = side_dx if needs_x else dx
        return None, dx, (g if needs_residual else None), *block.grads


class AddRelu(torch.autograd.Function):
    """z = relu(x + residual); one bit per value is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor) -> Tensor:
        z, mask = ops.affine_act_mask(x, *unit(x), residual)
        ctx.backend = forced_backend()
        ctx.save_for_backward(mask)
        return z

    @staticmethod
    @once_differentiable
    @each_gradient
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        dz = dz.contiguous(memory_format=torch.channels_last)
        with use_backend(ctx.backend) if ctx.backend else contextlib.nullcontext():
            g = ops.affine_act_backward(dz, mask, dz, unit(dz)[1])[0]  # its sums are of no use here
        return tuple(g if needed else None for needed in ctx.needs_input_grad)
