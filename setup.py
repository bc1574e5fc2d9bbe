"""Builds `resnet_fast._C`, the native kernels, with ninja. Imports no torch: one binary serves every version of it.

Environment:
    RESNET_FAST_CUDA      unset: CUDA kernels if they can be built; 1: fail if they cannot; 0: CPU only
    CUDA_HOME, CUDA_PATH  the CUDA toolkit, if `nvcc` is not on PATH or in the usual folder
    TORCH_CUDA_ARCH_LIST  GPU architectures, such as "8.0;9.0+PTX" (the default)
    MAX_JOBS              compilers at a time
    CXX, CXXFLAGS, LDFLAGS, CUDAHOSTCXX, NVCC_APPEND_FLAGS   as usual
"""

import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "ninja"  # fixed, unlike setuptools' own, so that rebuilds are incremental

DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"

# PER_ISA's files are compiled for each of these, and the best that the CPU has is chosen at run time.
X86_ISAS = {
    "baseline": "-msse4.2",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
}
ISAS = X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"baseline": ""}
PER_ISA = (
    "bn_act",
    "bn_act_backward",
    "stem",
    "stem_backward",
    "pointwise_backward",
    "winograd",
    "winograd_wgrad",
    "direct",
)


def warn(message: str) -> None:
    print(f"resnet_fast: {message}", file=sys.stderr, flush=True)


def output_of(*command: str | Path) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return result.stdout


# ---- The CUDA toolkit


class NoToolkitError(Exception):
    """No CUDA toolkit, with the reason."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that can compile and link: nvcc, headers and the static runtime."""

    nvcc: Path
    include: Path
    cudart: Path
    version: str


def first_existing(root: Path, *names: str) -> Path | None:
    paths = (path for name in names for path in sorted(root.glob(name)))
    return next((path for path in paths if path.exists()), None)


def toolkit_at(nvcc: Path) -> Toolkit | None:
    """The toolkit around this nvcc, or None if a part is missing, as it is around a wrapper script."""
    root = nvcc.parent.parent
    header = first_existing(root, "include/cuda_runtime.h", "targets/*/include/cuda_runtime.h")
    library = "libcudart_static.a"
    cudart = first_existing(root, f"lib64/{library}", f"lib/{library}", f"targets/*/lib/{library}")
    if not (nvcc.is_file() and header and cudart):
        return None
    version = re.search(r"\bV(\d+\.\d+\.\d+)", output_of(nvcc, "--version"))
    return Toolkit(nvcc, header.parent, cudart, version[1]) if version else None


def behind_wrapper(nvcc: Path) -> Path:
    """The nvcc that a wrapper script runs: a dry run prints its toolkit as TOP=..."""
    top = re.search(r"^#\$ TOP=(.+?)\s*$", output_of(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    return Path(top[1]).resolve() / "bin" / "nvcc" if top else nvcc


def nvcc_candidates() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "bin" / "nvcc"
    if on_path := shutil.which("nvcc"):
        yield Path(on_path).resolve()
        yield behind_wrapper(Path(on_path))
    yield Path("/usr/local/cuda/bin/nvcc")
    # The wheels nvidia-cuda-nvcc and nvidia-cuda-runtime, in the environment this Python belongs to
    # also under build isolation.
    for packages in dict.fromkeys([sysconfig.get_path("purelib"), *site.getsitepackages()]):
        yield from sorted(Path(packages, "nvidia").glob("cu*/bin/nvcc"), reverse=True)


def find_toolkit() -> Toolkit:
    candidates = list(dict.fromkeys(nvcc_candidates()))
    for nvcc in candidates:
        if toolkit := toolkit_at(nvcc):
            return toolkit
    if found := [str(nvcc) for nvcc in candidates if nvcc.is_file()]:
        raise NoToolkitError(f"{', '.join(found)} found, but not cuda_runtime.h and libcudart_static.a beside it")
    raise NoToolkitError("no nvcc in CUDA_HOME, CUDA_PATH, PATH, the usual folder or NVIDIA's wheels")


def architectures(text: str) -> list[str]:
    """The code to generate, from "8.0;9.0+PTX": sm_80, sm_90 and, as PTX for newer GPUs, compute_90."""
    result = []
    for entry in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if match:
            major, minor, variant, ptx = match.groups()
            result.append(f"sm_{major}{minor}{variant}")
            if ptx:
                result.append(f"compute_{major}{minor}{variant}")
        elif entry:
            warn(f"TORCH_CUDA_ARCH_LIST: '{entry}' ignored; write numbers, such as {DEFAULT_ARCHITECTURES}")
    return list(dict.fromkeys(result)) or architectures(DEFAULT_ARCHITECTURES)


def gencode(architecture: str) -> str:
    return f"-gencode=arch=compute_{architecture.split('_')[1]},code={architecture}"


# ---- What is built


@dataclass(frozen=True)
class Plan:
    """Everything that decides the build: what ninja is told, and what build_info() records."""

    version: str
    module: str
    pybind11: str
    toolkit: Toolkit | None
    architectures: list[str]
    no_cuda: str | None  # the reason

    @property
    def cxx(self) -> str:
        return os.environ.get("CXX") or "g++"

    def record(self) -> dict[str, object]:
        return {
            "version": self.version,
            "cuda": self.toolkit is not None,
            "nvcc": self.toolkit.version if self.toolkit else None,
            "cuda_archs": self.architectures,
            "compiler": output_of(*shlex.split(self.cxx), "--version").partition("\n")[0],
            "isas": list(ISAS),
            "openmp": True,
            "reason": self.no_cuda,
        }


@dataclass
class NinjaFile:
    """The text of a build.ninja, and the objects that it compiles."""

    lines: list[str] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)

    def rule(self, name: str, command: str, **settings: str) -> None:
        settings = {"command": command, "description": f"{name} $out", **settings}
        self.lines += [f"rule {name}", *(f"  {key} = {value}" for key, value in settings.items()), ""]

    def compile(self, rule: str, source: Path, flags: str = "", name: str = "", after: Iterable[str] = ()) -> None:
        target = f"{name or source.parent.name + '_' + source.stem}.o"
        implicit = f" | {' '.join(after)}" if after else ""
        self.lines += [f"build {target}: {rule} {escape(source)}{implicit}", f"  flags = {flags}", ""]
        self.objects.append(target)


def escape(path: str | Path) -> str:
    return re.sub(r"([$: ])", r"$\1", str(path))


def quote(path: str | Path) -> str:
    """A path for a command line inside a build.ninja."""
    return shlex.quote(str(path)).replace("$", "$$")


def add_rules(ninja: NinjaFile, plan: Plan) -> None:
    cxxflags = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp -Wall " + os.environ.get("CXXFLAGS", "")
    depfile = {"depfile": "$out.d", "deps": "gcc"}
    ninja.rule("cxx", f"{plan.cxx} {cxxflags} $flags -MMD -MF $out.d -c $in -o $out", **depfile)
    # Symbols of static libraries, the CUDA runtime's among them, stay inside the module.
    ninja.rule(
        "link", f"{plan.cxx} -shared -fopenmp -o $out $in -Wl,--exclude-libs,ALL $libs {os.environ.get('LDFLAGS', '')}"
    )
    if plan.toolkit:
        host = os.environ.get("CUDAHOSTCXX") or os.environ.get("CXX")
        nvccflags = "-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall -Xptxas=-warn-spills"
        nvccflags += "".join(f" {gencode(architecture)}" for architecture in plan.architectures)
        nvccflags += f" -ccbin={quote(host)}" if host else ""
        nvcc = quote(plan.toolkit.nvcc)
        ninja.rule("nvcc", f"{nvcc} {nvccflags} -MD -MF $out.d -c $in -o $out", **depfile)


def add_sources(ninja: NinjaFile, plan: Plan) -> None:
    # The compiler must not fuse multiply and add where the source does not say so: see cpu/vec.h. Nobody reads errno,
    # for which a loop would have to take its square roots one by one.
    exact = "-ffp-contract=off -fno-math-errno"
    for source in sorted(CSRC.glob("cpu/*.cpp")):
        if source.stem not in PER_ISA:
            ninja.compile("cxx", source, exact)
    for isa, flags in ISAS.items():
        flags = f"{exact} {flags} -DRESNET_FAST_NAMESPACE={isa}"
        for stem in PER_ISA:
            ninja.compile("cxx", CSRC / "cpu" / f"{stem}.cpp", flags, name=f"cpu_{stem}_{isa}")
    if plan.toolkit:
        for source in sorted(CSRC.glob("cuda/*.cu")):
            ninja.compile("nvcc", source)
        for source in sorted(CSRC.glob("cuda/*.cpp")):
            ninja.compile("cxx", source, f"-isystem {quote(plan.toolkit.include)}")
    includes = f"-isystem {quote(plan.pybind11)} -isystem {quote(sysconfig.get_path('include'))}"
    ninja.compile("cxx", CSRC / "bindings.cpp", f"{includes} -DRESNET_FAST_WITH_CUDA={int(bool(plan.toolkit))}")
    ninja.compile("cxx", CSRC / "build_record.cpp", f"-I{quote(BUILD)}", after=tuple(ninja.objects))


def add_link(ninja: NinjaFile, plan: Plan) -> None:
    libraries = f"{quote(plan.toolkit.cudart)} -ldl -lrt -lpthread" if plan.toolkit else "-ldl"
    ninja.lines += [f"build {plan.module}: link {' '.join(ninja.objects)}", f"  libs = {libraries}", ""]


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def write_build_files(plan: Plan) -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    record = json.dumps(plan.record())[:-1]  # the date goes before the closing brace
    write_if_changed(
        BUILD / "build_record.h",
        "#pragma once\n"
        f'constexpr char BUILD_RECORD[] = R"json({record}, "built": ")json" __DATE__ " " __TIME__ R"json("}})json";\n',
    )
    ninja = NinjaFile(["ninja_required_version = 1.5", ""])
    add_rules(ninja, plan)
    add_sources(ninja, plan)
    add_link(ninja, plan)
    write_if_changed(BUILD / "build.ninja", "\n".join(ninja.lines))


def run_ninja(module: str) -> None:
    jobs = os.environ.get("MAX_JOBS")
    command = [sys.executable, "-m", "ninja", "-C", str(BUILD), *(["-j", jobs] if jobs else []), module]
    subprocess.run(command, check=True)


# ---- setuptools


def wants_cuda() -> bool | None:
    """Whether RESNET_FAST_CUDA demands CUDA kernels, refuses them, or leaves it to chance."""
    setting = os.environ.get("RESNET_FAST_CUDA", "")
    if setting not in ("", "0", "1"):
        raise SystemExit(f"RESNET_FAST_CUDA={setting}: leave it unset, or set it to 0 or 1")
    return {"": None, "0": False, "1": True}[setting]


def make_plan(version: str, cuda: bool, reason: str | None) -> Plan:
    import pybind11

    toolkit = None
    if cuda:
        try:
            toolkit = find_toolkit()
        except NoToolkitError as error:
            reason = str(error)
    return Plan(
        version=version,
        module="_C" + sysconfig.get_config_var("EXT_SUFFIX"),
        pybind11=pybind11.get_include(),
        toolkit=toolkit,
        architectures=architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", "")) if toolkit else [],
        no_cuda=reason,
    )


def build(version: str) -> Plan:
    """Builds the module into BUILD, with CUDA if that is wanted and can be had."""
    cuda = wants_cuda()
    plan = make_plan(version, cuda is not False, "switched off by RESNET_FAST_CUDA=0" if cuda is False else None)
    if cuda and not plan.toolkit:
        raise SystemExit(f"RESNET_FAST_CUDA=1, but there is no CUDA toolkit: {plan.no_cuda}")
    try:
        write_build_files(plan)
        run_ninja(plan.module)
    except subprocess.CalledProcessError as error:
        if cuda or not plan.toolkit:
            raise SystemExit("resnet_fast: the build failed; the compiler's message is above") from error
        reason = f"compiling with nvcc {plan.toolkit.version} failed (RESNET_FAST_CUDA=1 makes this an error)"
        warn(f"{reason}; building for the CPU only")
        plan = make_plan(version, cuda=False, reason=reason)
        write_build_files(plan)
        run_ninja(plan.module)
    return plan


def report(plan: Plan) -> None:
    if plan.toolkit:
        warn(f"built with CUDA kernels for {', '.join(plan.architectures)} (nvcc {plan.toolkit.version})")
    else:
        warn("*" * 72)
        warn("built for the CPU ONLY: there are NO CUDA kernels in this build.")
        warn(f"Reason: {plan.no_cuda}")
        warn("*" * 72)


class BuildExt(build_ext):
    """Hands the whole extension to ninja."""

    def build_extension(self, ext: Extension) -> None:
        """Builds the module and puts it where setuptools wants it."""
        plan = build(self.distribution.get_version())
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(BUILD / plan.module, target)
        report(plan)


def relative(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in CSRC.glob(pattern))


if __name__ == "__main__":
    extension = Extension(
        "resnet_fast._C",
        sources=relative("*.cpp", "cpu/*.cpp"),
        depends=relative("*.h", "cpu/*.h", "cuda/*"),  # for the source distribution
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})
