"""The native kernels, built by setup.py from csrc; csrc/resnet_fast.h says what each op computes.

Operands are addresses (`tensor.data_ptr()`; 0 is an absent one) of channels-last matrices (npq, k) of storage
type `dtype`, or of float32 arrays (k,). Nothing is checked here. `cuda` is there only if it was built.
"""

import enum
from typing import Protocol, TypedDict

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
        *, y: int, mean: int, var: int, workspace: int, npq: int, k: int, dtype: DType, stream: int = 0
    ) -> None: ...
    @staticmethod
    def affine_act(
        *,
        y: int,
        scale: int,
        shift: int,
        residual: int = 0,
        rscale: int = 0,
        rshift: int = 0,
        z: int,
        npq: int,
        k: int,
        dtype: DType,
        relu: bool,
        stream: int = 0,
    ) -> None: ...
    @staticmethod
    def affine_act_backward(
        *,
        dz: int,
        z: int,
        y: int,
        mean: int,
        ry: int = 0,
        rmean: int = 0,
        g: int,
        sum_g: int,
        sum_gy: int,
        sum_gry: int = 0,
        workspace: int,
        npq: int,
        k: int,
        dtype: DType,
        stream: int = 0,
    ) -> None: ...
    @staticmethod
    def bn_backward_sums(
        *,
        dz: int,
        y: int,
        mean: int,
        scale: int = 0,
        shift: int = 0,
        sum_g: int,
        sum_gy: int,
        workspace: int,
        npq: int,
        k: int,
        dtype: DType,
        stream: int = 0,
    ) -> None: ...
    @staticmethod
    def bn_backward_apply(
        *,
        dz: int,
        y: int,
        mean: int,
        a: int,
        b: int,
        c: int,
        scale: int = 0,
        shift: int = 0,
        dy: int,
        npq: int,
        k: int,
        dtype: DType,
        stream: int = 0,
    ) -> None: ...

class _Cpu(_Ops, Protocol):
    @staticmethod
    def isa() -> str: ...
    @staticmethod
    def fingerprint(*, addresses: list[int], nbytes: list[int], stride: int) -> int: ...
    @staticmethod
    def openmp_info() -> OpenMPInfo: ...

class _Cuda(_Ops, Protocol):
    @staticmethod
    def driver_ok() -> str: ...

cpu: _Cpu
cuda: _Cuda
