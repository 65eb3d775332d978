"""The native operators: found prebuilt, or built once for this machine, and the choice between them and PyTorch.

Nothing is compiled, loaded or probed at import; the first call that wants the operators does so. There are two
libraries: "cpu" holds the operators' definitions and their CPU kernels, "cuda" the CUDA kernels for them. Each lives
in a folder whose name says what it was built for, below `kernels/lib` in a wheel that carries it, else below
`TORCH_EXTENSIONS_DIR` (default: `torch_extensions` in the user's cache folder).
"""

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from .registration import register

try:
    import fcntl
except ImportError:  # not a POSIX system: two processes may build at once, which costs time only
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

VARIABLE = "VIT_ADAPTER_MSDA"
IMPLEMENTATIONS = ("auto", "native", "reference")
CUDA_ARCHITECTURES = "8.0;9.0+PTX"  # built where no GPU says which

_FOLDER = Path(__file__).resolve().parent
_SOURCES = {"cpu": ("schema.cpp", "ms_deform_attn_cpu.cpp"), "cuda": ("ms_deform_attn_cuda.cu",)}
_HEADERS = {"cpu": (".h",), "cuda": (".h", ".cuh")}
# -fno-math-errno and -fno-trapping-math change no result; without them the compiler may not vectorise selections.
_COMPILER_FLAGS = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
_CAPABILITY_FLAGS = {
    "AVX2": "-mavx2 -mfma -mf16c",
    "AVX512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
}
_LOCK = threading.Lock()
_BUILD = "import json, sys, torch.utils.cpp_extension as c; c.load(**json.loads(sys.argv[1]))"


class Choice(NamedTuple):
    """Which implementation runs ("native" or "reference"), and why, in one sentence."""

    implementation: str
    reason: str


class NativeUnavailableError(RuntimeError):
    """The native operators cannot run here; the text names the reason and the cure."""


@torch.compiler.assume_constant_result
def use_native(device_type: str, implementation: str = "auto") -> bool:
    """Whether to run the native operators; builds and loads them first if need be.

    Args:
        device_type: of the tensors, such as "cpu".
        implementation: "native", "reference", or "auto" for what the variable VIT_ADAPTER_MSDA says, which in its
            turn may say "auto" (its default): native where it can be.

    Raises:
        ValueError: an implementation of another name.
        NativeUnavailableError: "native" was asked for and cannot run here.
    """
    wanted = _wanted(implementation)
    if wanted == "reference":
        return False
    choice = _load(device_type)
    if wanted == "native" and choice.implementation != "native":
        raise NativeUnavailableError(choice.reason)
    return choice.implementation == "native"


def describe(device_type: str | None = None) -> Choice:
    """What "auto" runs on a device type (default: "cuda" where there is one, else "cpu"), and why.

    Loads the library if it is there, but builds nothing.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if _wanted("auto") == "reference":
        return Choice("reference", f"{VARIABLE} is set to reference")
    if device_type in _SOURCES and _csrc().is_dir() and not all(map(_find, _libraries(device_type))):
        return Choice("native", "not built yet: the first use builds it, or `vit-adapter build-kernels` now")
    return _load(device_type)


def build(cuda: bool | None = None) -> list[Path]:
    """Builds the libraries ahead of their first use, for instance into the image of a container.

    Args:
        cuda: also build for CUDA; None: where a CUDA device is visible. The variable TORCH_CUDA_ARCH_LIST says for
            which architectures; without it, for the visible devices, or for 8.0 and 9.0 (and later) if there is none.

    Returns:
        The files of the libraries, built now or before.

    Raises:
        NativeUnavailableError: something that the build needs is missing, or the compiler failed.
    """
    kinds = _libraries("cuda" if cuda or (cuda is None and torch.cuda.is_available()) else "cpu")
    return [_find(kind) or _build(kind, _target(kind), _cache()) for kind in kinds]


def build_for_wheel(folder: Path) -> list[Path]:
    """Builds what a wheel carries into its `kernels/lib`: for processors up to this one, and for CUDA if it can."""
    capability = torch.backends.cpu.get_cpu_capability()
    paths = [_build("cpu", target, folder) for target in {"AVX512": ("AVX2", "AVX512")}.get(capability, (capability,))]
    try:
        cuda_home()
    except NativeUnavailableError as error:
        logger.warning("The wheel carries no CUDA kernel: %s", error)
    else:
        paths.append(_build("cuda", _target("cuda"), folder))
    for path in paths:
        (path.parent / "lock").unlink()
    return paths


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for a list such as "8.0;9.0+PTX" runs on a device of a capability such as (8, 6).

    Machine code runs on its own major version from its minor version on; PTX on everything from its version on.
    """
    for major, minor, ptx in re.findall(r"(\d+)\.(\d+)a?(\+PTX)?", architectures):
        version = int(major), int(minor)
        if version <= capability and (ptx or version[0] == capability[0]):
            return True
    return False


def _wanted(implementation: str) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, but got {implementation!r}")
    if implementation != "auto":
        return implementation
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in IMPLEMENTATIONS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(IMPLEMENTATIONS)}, but is {wanted!r}")
    return wanted


def _load(device_type: str) -> Choice:
    with _LOCK:
        return _load_once(device_type)


@functools.cache
def _load_once(device_type: str) -> Choice:
    """Loads the libraries for a device type. What fails is logged here, and so once too."""
    if device_type not in _SOURCES:
        return Choice("reference", f"there is no native kernel for {device_type}")
    if not _csrc().is_dir():
        return Choice("reference", "the sources of the native kernels are not here (only the model's code is)")
    try:
        paths = [_library(kind) for kind in _libraries(device_type)]
    except NativeUnavailableError as error:
        logger.warning(
            "Deformable attention on %s runs in plain PyTorch, several times slower: %s", device_type, error
        )
        return Choice("reference", str(error))
    return Choice("native", f"loaded {paths[-1]}")


def _libraries(device_type: str) -> list[str]:
    return ["cpu", "cuda"] if device_type == "cuda" else ["cpu"]


@functools.cache
def _library(kind: str) -> Path:
    """Finds or builds a library, and loads it."""
    path = _find(kind) or _build(kind, _target(kind), _cache())
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise NativeUnavailableError(f"{path} does not load ({error}); delete its folder to build it anew") from error
    if kind == "cpu":
        register()
    return path


def _csrc() -> Path:
    return _FOLDER / "csrc"


def _cache() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")


def _target(kind: str) -> str:
    """What a library is built for here: a CPU capability, or CUDA architectures."""
    return torch.backends.cpu.get_cpu_capability() if kind == "cpu" else _cuda_architectures()


def _tag(kind: str, target: str) -> str:
    """Name of the folder of a library: all that it depends on."""
    cuda = f"cu{torch.version.cuda}" if torch.version.cuda else "nocuda"
    return f"vit_adapter-{kind}-torch{torch.__version__}-{cuda}-{target.replace(';', '_')}-{_fingerprint(kind)}"


@functools.cache
def _fingerprint(kind: str) -> str:
    """Changes when any source of a library changes, or a flag."""
    digest = hashlib.sha256(json.dumps([_COMPILER_FLAGS, _CAPABILITY_FLAGS]).encode())
    for source in sorted(_csrc().iterdir()):
        if source.name in _SOURCES[kind] or source.suffix in _HEADERS[kind]:
            digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:12]


def _find(kind: str) -> Path | None:
    """The file of a library that fits this machine, if there is one."""
    for folder in (_FOLDER / "lib", _cache()):
        if kind == "cpu":
            candidates = [folder / _tag("cpu", _target("cpu"))]
        else:
            candidates = [path for path in sorted(folder.glob(_tag("cuda", "*"))) if _runs_here(path.name)]
        for candidate in candidates:
            if (candidate / f"{kind}.so").is_file():
                return candidate / f"{kind}.so"
    return None


def _runs_here(tag: str) -> bool:
    """Whether a CUDA library of that name has code for every visible device, or where none is, for the default."""
    architectures = tag.rsplit("-", 2)[1].replace("_", ";")
    if not torch.cuda.is_available():
        return architectures == _cuda_architectures()
    return all(covers(architectures, capability) for capability in _capabilities())


def _capabilities() -> list[tuple[int, int]]:
    return sorted({torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())})


def _cuda_architectures() -> str:
    """What to build for: TORCH_CUDA_ARCH_LIST, else the visible devices, else what most have."""
    if architectures := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return architectures.replace(" ", ";")
    return ";".join(f"{major}.{minor}" for major, minor in _capabilities()) or CUDA_ARCHITECTURES


def _build(kind: str, target: str, root: Path) -> Path:
    """Builds a library for a target into its folder below a root.

    In a process of its own, so that this one's environment stays as it is; into a temporary folder, from where only
    the finished library moves to its place, so that nobody ever sees half of one. Of several processes that want the
    same library, one builds and the others wait.
    """
    environment = _environment(kind)
    folder = root / _tag(kind, target)
    library = folder / f"{kind}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"), tempfile.TemporaryDirectory(dir=folder) as workshop:
            if library.is_file():
                return library
            logger.warning("Building the %s kernel of deformable attention, once, in under a minute: %s", kind, folder)
            arguments = {
                "name": kind,
                "sources": [str(_csrc() / source) for source in _SOURCES[kind]],
                "is_python_module": False,
                "build_directory": workshop,
                "extra_cflags": _COMPILER_FLAGS + _CAPABILITY_FLAGS.get(target, "").split(),
                "extra_cuda_cflags": ["-O3"],
                "extra_ldflags": ["-fopenmp"],
            }
            command = [sys.executable, "-c", _BUILD, json.dumps(arguments)]
            result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if result.returncode:
                log = folder / "build.log"
                words = result.stdout + result.stderr
                log.write_text(words)
                error = next((line for line in words.splitlines() if "error: " in line), "no word of an error")
                raise NativeUnavailableError(f"the {kind} kernel did not build, see {log}; first: {error.strip()}")
            os.replace(Path(workshop) / f"{kind}.so", library)
    except OSError as error:
        raise NativeUnavailableError(
            f"{folder} cannot be written ({error}); let TORCH_EXTENSIONS_DIR name a folder that can"
        ) from error
    return library


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that the system releases when the process ends, however it ends."""
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _environment(kind: str) -> dict[str, str]:
    """The environment of a build, with all it needs.

    Raises:
        NativeUnavailableError: something is missing.
    """
    environment = dict(os.environ)
    # Console scripts of this Python (ninja among them) are on PATH only where its environment is activated.
    environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), environment.get("PATH", os.defpath)])
    if shutil.which("ninja", path=environment["PATH"]) is None:
        raise NativeUnavailableError("ninja is missing; `pip install ninja` cures it")
    compiler = environment.get("CXX", "c++")
    if shutil.which(compiler.split()[0], path=environment["PATH"]) is None:
        raise NativeUnavailableError(f"there is no C++ compiler {compiler}; install g++, or name one in CXX")
    if kind == "cuda":
        if torch.version.cuda is None:
            raise NativeUnavailableError("this PyTorch is built without CUDA; install one that is")
        architectures = _cuda_architectures()
        for capability in _capabilities():
            if not covers(architectures, capability):
                raise NativeUnavailableError(
                    f"a visible device has architecture {capability[0]}.{capability[1]}, which TORCH_CUDA_ARCH_LIST="
                    f"{architectures} leaves out; unset the variable, or add it"
                )
        environment["CUDA_HOME"] = str(cuda_home())
        environment["TORCH_CUDA_ARCH_LIST"] = architectures
    return environment


def cuda_home() -> Path:
    """The CUDA toolkit's own folder. PyTorch guesses it from nvcc's place, which is wrong for a wrapper elsewhere.

    Raises:
        NativeUnavailableError: there is no toolkit, or one of another major version than PyTorch's.
    """
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(given) / "bin" / "nvcc") if given else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).is_file():
        raise NativeUnavailableError(
            f"there is no nvcc at {nvcc}; install the toolkit of CUDA {torch.version.cuda}, or name it in CUDA_HOME"
        )
    output = subprocess.run(
        [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    ).stderr
    here = re.search(r"^#\$ _HERE_=(.+)$", output, re.MULTILINE)
    home = Path(here[1] if here else Path(nvcc).resolve().parent).parent
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"release (\d+)", release)
    if torch.version.cuda and version and version[1] != torch.version.cuda.split(".")[0]:
        raise NativeUnavailableError(
            f"nvcc of {home} is of CUDA {version[1]}, but this PyTorch of CUDA {torch.version.cuda}; "
            "install the toolkit of that version, and name its folder in CUDA_HOME"
        )
    return home
