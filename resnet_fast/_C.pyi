"""The native kernels, built by setup.py from csrc; csrc/resnet_fast.h says what each op computes.

Operands are channels-last matrices (npq, k) of storage type `dtype`, images (n, h, w, k) in the stem's ops, or float32
arrays (k,): tensors, which go by their address, or addresses; None and 0 are an absent one. Nothing is checked here.
`cuda` is there only if it was built.
"""

import enum
from typing import Any, Protocol, TypeAlias, TypedDict

from torch import Tensor

Operand: TypeAlias = int | Tensor | None

class DType(enum.Enum):
    float32 = 0
    bfloat16 = 1
    float16 = 2

class BuildInfo(TypedDict):
    version: str
    cuda: bool
    nvcc: str | None
    cuda_archs: list[str]
    compiler: str
    isas: list[str]
    openmp: bool
    reason: str | None
    built: str

class OpenMPInfo(TypedDict):
    max_threads: int
    runtime: str

def build_info() -> BuildInfo: ...

class _Ops(Protocol):
    @staticmethod
    def bn_workspace(*, npq: int, k: int) -> int: ...
    @staticmethod
    def bn_stats(
        *,
        y: Operand,
        gamma: Operand = 0,
        beta: Operand = 0,
        mean: Operand,
        var: Operand,
        rstd: Operand,
        scale: Operand,
        shift: Operand,
        workspace: Operand,
        npq: int,
        k: int,
        eps: float,
        dtype: DType,
        stream: int = 0,
    ) -> None: ...
    @staticmethod
    def bn_finalize(
        *,
        n: Operand,
        means: Operand,
        vars: Operand,
        gamma: Operand = 0,
        beta: Operand = 0,
        mean: Operand,
        var: Operand,
        rstd: Operand,
        scale: Operand,
        shift: Operand,
        parts: int,
        k: int,
        eps: float,
        stream: int = 0,
    ) -> None: ...
    @staticmethod
    def affine_act(
        *,
        y: Operand,
        scale: Operand,
        shift: Operand,
        residual: Operand = 0,
        rscale: Operand = 0,
        rshift: Operand = 0,
        z: Operand,
        mask: Operand = 0,
        npq: int,
        k: int,
        dtype: DType,
        relu: bool,
        stream: int = 0,
    ) -> None: ...
    @staticmethod
    def affine_act_backward(
        *,
        dz: Operand,
        z: Operand = 0,
        mask: Operand = 0,
        y: Operand,
        mean: Operand,
        ry: Operand = 0,
        rmean: Operand = 0,
        g: Operand,
        sum_g: Operand,
        sum_gy: Operand,
        sum_gry: Operand = 0,
        workspace: Operand,
        npq: int,
        k: int,
        dtype: DType,
        stream: int = 0,
    ) -> None: ...
    @staticmethod
    def bn_backward_sums(
        *,
        dz: Operand,
        y: Operand,
        mean: Operand,
        scale: Operand = 0,
        shift: Operand = 0,
        sum_g: Operand,
        sum_gy: Operand,
        workspace: Operand,
        npq: int,
        k: int,
        dtype: DType,
        stream: int = 0,
    ) -> None: ...
    @staticmethod
    def bn_backward_finalize(
        *,
        sum_g: Operand,
        sum_gy: Operand,
        rstd: Operand,
        scale: Operand,
        b: Operand,
        c: Operand,
        dgamma: Operand,
        n: float,
        k: int,
        stream: int = 0,
    ) -> None: ...
    @staticmethod
    def bn_backward_apply(
        *,
        dz: Operand,
        y: Operand,
        mean: Operand,
        a: Operand,
        b: Operand,
        c: Operand,
        scale: Operand = 0,
        shift: Operand = 0,
        dy: Operand,
        npq: int,
        k: int,
        dtype: DType,
        stream: int = 0,
    ) -> None: ...
    @staticmethod
    def affine_act_maxpool(
        *,
        y: Operand,
        scale: Operand,
        shift: Operand,
        z: Operand,
        index: Operand,
        n: int,
        h: int,
        w: int,
        k: int,
        dtype: DType,
        stream: int = 0,
    ) -> None: ...
    @staticmethod
    def maxpool_backward_sums(
        *,
        dz: Operand,
        index: Operand,
        y: Operand,
        mean: Operand,
        sum_g: Operand,
        sum_gy: Operand,
        workspace: Operand,
        n: int,
        h: int,
        w: int,
        k: int,
        dtype: DType,
        stream: int = 0,
    ) -> None: ...
    @staticmethod
    def maxpool_backward_apply(
        *,
        dz: Operand,
        index: Operand,
        y: Operand,
        mean: Operand,
        a: Operand,
        b: Operand,
        c: Operand,
        dy: Operand,
        n: int,
        h: int,
        w: int,
        k: int,
        dtype: DType,
        stream: int = 0,
    ) -> None: ...

class _Cpu(_Ops, Protocol):
    @staticmethod
    def winograd_weight_size(*, c: int, k: int) -> int: ...
    @staticmethod
    def winograd_weight(
        *,
        w: Operand,
        u: Operand,
        c: int,
        k: int,
        c_stride: int,
        k_stride: int,
        tap_stride: int,
        flip: bool,
        dtype: DType,
    ) -> None: ...
    @staticmethod
    def winograd_workspace(*, n: int, h: int, w: int, c: int, k: int, threads: int) -> int: ...
    @staticmethod
    def winograd_conv(
        *,
        x: Operand,
        u: Operand,
        shift: Operand = 0,
        residual: Operand = 0,
        z: Operand,
        workspace: Operand,
        n: int,
        h: int,
        w: int,
        c: int,
        k: int,
        threads: int,
        dtype: DType,
        relu: bool,
    ) -> None: ...
    @staticmethod
    def winograd_wgrad_units(*, n: int, h: int, w: int, c: int, k: int, threads: int) -> int: ...
    @staticmethod
    def winograd_wgrad_workspace(*, n: int, h: int, w: int, c: int, k: int, threads: int) -> int: ...
    @staticmethod
    def winograd_wgrad(
        *,
        dy: Operand,
        x: Operand,
        scale: Operand = 0,
        shift: Operand = 0,
        dw: Operand,
        workspace: Operand,
        n: int,
        h: int,
        w: int,
        c: int,
        k: int,
        threads: int,
        dtype: DType,
    ) -> None: ...
    @staticmethod
    def pointwise_backward_units(*, npq: int, channels: int, k: int, threads: int) -> int: ...
    @staticmethod
    def pointwise_backward_workspace(*, npq: int, channels: int, k: int, threads: int) -> int: ...
    @staticmethod
    def pointwise_backward(
        *,
        g: Operand,
        y: Operand = 0,
        mean: Operand = 0,
        a: Operand = 0,
        b: Operand = 0,
        c: Operand = 0,
        gscale: Operand = 0,
        gshift: Operand = 0,
        x: Operand,
        scale: Operand = 0,
        shift: Operand = 0,
        w: Operand,
        residual: Operand = 0,
        dx: Operand = 0,
        dw: Operand = 0,
        workspace: Operand,
        npq: int,
        channels: int,
        k: int,
        threads: int,
        dtype: DType,
    ) -> None: ...
    @staticmethod
    def direct_panel() -> int: ...
    @staticmethod
    def direct_workspace(shape: tuple[int, ...]) -> int: ...
    @staticmethod
    def direct_conv(
        *,
        x: Operand,
        weights: Operand,
        shift: Operand = 0,
        residual: Operand = 0,
        z: Operand,
        workspace: Operand,
        shape: tuple[int, ...],
        relu: bool,
    ) -> None: ...
    @staticmethod
    def isa() -> str: ...
    class Fingerprint:
        def __init__(self, *, spans: list[tuple[int, int]], whole: int, stride: int) -> None: ...
        def value(self) -> int: ...

    @staticmethod
    def unchanged(
        contents: tuple[dict[Any, Any], ...],
        sizes: bytes,
        values: tuple[Any, ...],
        empty: tuple[dict[Any, Any], ...],
        objects: tuple[Any, ...],
        kinds: tuple[type, ...],
    ) -> bool: ...
    @staticmethod
    def in_place(tensors: tuple[Tensor, ...], then: bytes, data_ptr: Any, version: Any) -> bool: ...
    @staticmethod
    def bn_stats_update(
        *, buffers: list[Tensor], values: list[Tensor], sizes: list[int], factor: float, counters: list[Tensor]
    ) -> None: ...
    @staticmethod
    def huge_pages(*, address: int, nbytes: int) -> int: ...
    @staticmethod
    def openmp_info() -> OpenMPInfo: ...

class _Cuda(_Ops, Protocol):
    @staticmethod
    def bottleneck(
        *,
        x: Operand,
        w1: Operand,
        scale1: Operand,
        shift1: Operand,
        w2: Operand,
        scale2: Operand,
        shift2: Operand,
        w3: Operand,
        scale3: Operand,
        shift3: Operand,
        rw: Operand = 0,
        rscale: Operand = 0,
        rshift: Operand = 0,
        z: Operand,
        n: int,
        h: int,
        w: int,
        c: int,
        width: int,
        k: int,
        dtype: DType,
        stream: int = 0,
    ) -> None: ...
    @staticmethod
    def bottleneck_shared(*, c: int, width: int, k: int, projection: bool, resident: bool) -> int: ...
    @staticmethod
    def whole_stem(
        *,
        x: Operand,
        weight: Operand,
        scale: Operand,
        shift: Operand,
        z: Operand,
        n: int,
        h: int,
        w: int,
        dtype: DType,
        stream: int = 0,
    ) -> None: ...
    @staticmethod
    def whole_stem_shared() -> int: ...
    @staticmethod
    def shared_limit() -> int: ...
    @staticmethod
    def driver_ok() -> str: ...

cpu: _Cpu
cuda: _Cuda
