"""What nvcc makes of the CUDA kernels, for every architecture: registers suffice, and memory moves in wide pieces."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest

import vit_adapter.kernels.native as native

SOURCE = Path(__file__).parent / "machine_code" / "every_kernel.cu"
CSRC = Path(native.__file__).parent / "csrc"
ARCHITECTURES = ["80", "86", "89", "90", "100", "120"]
VARIANTS = 3 * 5  # element types, variants of `with_variant`


class Report(NamedTuple):
    """Of one architecture: ptxas' words, and the disassembly of each kernel (empty without a disassembler)."""

    ptxas: str
    kernels: dict[str, str]


def find_nvcc() -> Path | None:
    try:
        return native.cuda_home() / "bin" / "nvcc"
    except native.NativeUnavailableError:
        return None


def find_cuobjdump(nvcc: Path) -> Path | None:
    """The toolkit's disassembler, or the one that Triton carries."""
    triton = Path(sysconfig.get_path("purelib")) / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = [path for path in (nvcc.parent / "cuobjdump", triton) if path.is_file()]
    return found[0] if found else None


@pytest.fixture(scope="module", params=ARCHITECTURES)
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Report:
    nvcc = find_nvcc()
    if nvcc is None or shutil.which("g++") is None:
        pytest.skip("no CUDA toolkit of PyTorch's CUDA version, or no g++")
    binary = tmp_path_factory.mktemp("machine_code") / f"sm_{request.param}.cubin"
    target = f"-gencode=arch=compute_{request.param},code=sm_{request.param}"
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{CSRC}", target, "-cubin", "-Xptxas", "-v"]
    ptxas = subprocess.run([nvcc, *flags, SOURCE, "-o", binary], check=True, capture_output=True, text=True).stderr
    cuobjdump = find_cuobjdump(nvcc)
    if cuobjdump is None:
        return Report(ptxas, {})
    listing = subprocess.run([cuobjdump, "-sass", binary], check=True, capture_output=True, text=True).stdout
    _, *parts = re.split(r"Function : (\S+)", listing)
    return Report(ptxas, dict(zip(parts[::2], parts[1::2], strict=True)))


@pytest.fixture
def kernels(report: Report) -> dict[str, str]:
    if not report.kernels:
        pytest.skip("no cuobjdump to read the machine code with")
    return report.kernels


def test_nothing_spills_and_no_thread_has_a_stack(report):
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report.ptxas)
    assert len(frames) == 3 * VARIANTS + 3
    assert set(frames) == {("0", "0", "0")}


def test_no_kernel_touches_local_memory(kernels):
    assert len(kernels) == 3 * VARIANTS + 3
    assert [name for name, code in kernels.items() if re.search(r"\b(LDL|STL)\b", code)] == []


def test_tuned_kernels_load_and_store_16_bytes_at_once(kernels):
    tuned = [name for name in kernels if "Variant" in name and not name_has(name, "Li0ELi0E")]
    assert len(tuned) == 3 * 3 * 4
    for name in tuned:
        assert kernels[name].count("LDG.E.128") >= 4, name  # one for each corner
        assert "forward" not in name or "STG.E.128" in kernels[name], name


def test_gradients_are_added_four_at_once_from_architecture_9_on(request, kernels):
    architecture = int(request.node.callspec.params["report"])
    tuned = [name for name in kernels if "FloatSum" in name and not name_has(name, "Li0ELi0E")]
    assert len(tuned) == 3 * 4
    for name in tuned:
        wide, single = kernels[name].count("F32x4"), len(re.findall(r"RED\w*\.E\.ADD\.F32\.", kernels[name]))
        assert (wide >= 4 and single == 0) if architecture >= 90 else (wide == 0 and single >= 16), name


def name_has(name: str, sizes: str) -> bool:
    """Whether a kernel's mangled name says that its variant is of those channels and samples."""
    return re.search(rf"VariantI\w+?ELi\d+E{sizes}", name) is not None
