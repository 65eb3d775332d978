"""Building the native operators, finding them again, and choosing between them and the reference."""

import functools
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vit_adapter.kernels import native
from vit_adapter.kernels.ms_deform_attn import ms_deform_attn

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
BUILD_SMALL = """
import sys
from pathlib import Path
from vit_adapter.kernels import native
native._csrc = lambda: Path(sys.argv[1])
native._SOURCES = {"cpu": ("small.cpp",)}
print(native._build("cpu", "DEFAULT", Path(sys.argv[2])))
"""
TINY = [torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1), [(1, 1)], [(1, 1)], 1]


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lets `native` build a library that compiles at once, into the folder that this returns."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "small.cpp").write_text('extern "C" int vit_adapter_test() { return 1; }\n')
    monkeypatch.setattr(native, "_csrc", lambda: tmp_path / "csrc")
    monkeypatch.setattr(native, "_SOURCES", {"cpu": ("small.cpp",)})
    monkeypatch.setattr(native, "_fingerprint", lambda kind: "0123456789ab")
    return tmp_path / "cache"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets for this test, and only for it, what is loaded."""
    for name in ("_load_once", "_library"):
        monkeypatch.setattr(native, name, functools.cache(getattr(native, name).__wrapped__))
    monkeypatch.delenv(native.VARIABLE, raising=False)


def test_import_compiles_loads_and_probes_nothing():
    check = (
        "import sys, torch, vit_adapter.kernels.ms_deform_attn as m;"
        "assert 'torch.utils.cpp_extension' not in sys.modules;"
        "assert not torch.cuda.is_initialized();"
        "assert not hasattr(torch.ops.vit_adapter, 'ms_deform_attn')"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


@needs_compiler
def test_build_needs_no_activated_environment_and_is_found_again(small_library, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    path = native._build("cpu", "DEFAULT", small_library)
    assert path == small_library / native._tag("cpu", "DEFAULT") / "cpu.so"
    torch.ops.load_library(path)
    before = path.stat().st_mtime_ns
    assert native._build("cpu", "DEFAULT", small_library).stat().st_mtime_ns == before
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["cpu.so", "lock"]


@needs_compiler
def test_two_processes_that_build_at_once_get_the_same_library(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "small.cpp").write_text('extern "C" int vit_adapter_test() { return 2; }\n')
    command = [sys.executable, "-c", BUILD_SMALL, tmp_path / "csrc", tmp_path / "cache"]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0] and Path(results[0][0].strip()).is_file()
    assert sum("Building the cpu kernel" in stderr for _, stderr in results) == 1


@needs_compiler
def test_a_source_that_does_not_compile_is_reported_with_the_compilers_words(small_library, tmp_path):
    (tmp_path / "csrc" / "small.cpp").write_text("#error out of order\n")
    with pytest.raises(native.NativeUnavailableError, match=r"build\.log; first: .*out of order"):
        native._build("cpu", "DEFAULT", small_library)
    log = small_library / native._tag("cpu", "DEFAULT") / "build.log"
    assert "out of order" in log.read_text()


@pytest.mark.parametrize(
    "missing, cure", [("ninja", "pip install ninja"), ("c\\+\\+", r"install g\+\+, or name one in CXX")]
)
def test_what_a_build_needs_is_named_where_it_is_missing(monkeypatch, missing, cure):
    which = shutil.which
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(
        native.shutil, "which", lambda name, path=None: None if name == missing.replace("\\", "") else which(name)
    )
    with pytest.raises(native.NativeUnavailableError, match=f"{missing}.*{cure}"):
        native._environment("cpu")


def test_a_cache_that_cannot_be_written_is_named(small_library, tmp_path):
    small_library.write_text("a file where the folder should be")
    with pytest.raises(native.NativeUnavailableError, match=r"cannot be written .*; let TORCH_EXTENSIONS_DIR"):
        native._build("cpu", "DEFAULT", small_library)


def test_without_native_the_reference_runs_with_one_warning_and_native_is_an_error(monkeypatch, fresh, caplog):
    def fail(*arguments: object) -> Path:
        raise native.NativeUnavailableError("ninja is missing; `pip install ninja` cures it")

    monkeypatch.setattr(native, "_find", lambda kind: None)
    monkeypatch.setattr(native, "_build", fail)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert ms_deform_attn(*TINY).item() == 1
    assert [record.getMessage().count("pip install ninja") for record in caplog.records] == [1]
    with pytest.raises(native.NativeUnavailableError, match="ninja is missing"):
        ms_deform_attn(*TINY, implementation="native")


def test_variable_chooses_and_argument_overrules_it(monkeypatch, fresh):
    monkeypatch.setattr(native, "_load", lambda device_type: native.Choice("native", "for this test"))
    assert native.use_native("cpu")
    monkeypatch.setenv(native.VARIABLE, "reference")
    assert not native.use_native("cpu")
    assert native.describe("cpu") == ("reference", "VIT_ADAPTER_MSDA is set to reference")
    assert native.use_native("cpu", "native")
    monkeypatch.setenv(native.VARIABLE, "quick")
    with pytest.raises(ValueError, match="VIT_ADAPTER_MSDA must be one of auto, native, reference, but is 'quick'"):
        native.use_native("cpu")


def test_code_without_its_sources_runs_the_reference_in_silence(monkeypatch, fresh, tmp_path, caplog):
    monkeypatch.setattr(native, "_csrc", lambda: tmp_path / "nothing")
    assert not native.use_native("cpu")
    assert "sources" in native.describe("cpu").reason
    assert not caplog.records


def test_other_devices_run_the_reference():
    assert native.describe("mps") == ("reference", "there is no native kernel for mps")


def test_describe_builds_nothing(monkeypatch, fresh):
    monkeypatch.setattr(native, "_find", lambda kind: None)
    monkeypatch.setattr(native, "_build", lambda *arguments: pytest.fail("built"))
    assert native.describe("cpu").reason.startswith("not built yet")


def test_folder_names_all_that_a_library_depends_on(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX")
    tag = native._tag("cuda", native._target("cuda"))
    assert torch.__version__ in tag and "-8.0_9.0+PTX-" in tag and str(torch.version.cuda or "nocuda") in tag
    assert torch.backends.cpu.get_cpu_capability() in native._tag("cpu", native._target("cpu"))
    assert native._fingerprint("cuda") != native._fingerprint("cpu")


@pytest.mark.parametrize(
    "architectures, capability, covered",
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),  # the same major version, a later minor one
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0+PTX", (8, 6), False),
        ("8.0;9.0+PTX", (12, 0), True),
        ("10.0", (12, 0), False),
    ],
)
def test_architectures_cover_what_their_code_runs_on(architectures, capability, covered):
    assert native.covers(architectures, capability) is covered


def test_library_for_other_devices_is_passed_over(monkeypatch):
    monkeypatch.setattr(native.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "_capabilities", lambda: [(8, 0), (9, 0)])
    assert native._runs_here(native._tag("cuda", "8.0;9.0"))
    assert not native._runs_here(native._tag("cuda", "9.0"))


def test_device_that_the_listed_architectures_leave_out_is_named(monkeypatch):
    monkeypatch.setattr(native.torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "_capabilities", lambda: [(12, 0)])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    monkeypatch.setattr(native.shutil, "which", lambda name, path=None: f"/usr/bin/{name}")
    with pytest.raises(
        native.NativeUnavailableError, match=r"architecture 12\.0, which TORCH_CUDA_ARCH_LIST=8\.0 leaves"
    ):
        native._environment("cuda")


def make_nvcc(folder: Path, script: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return nvcc


def test_toolkit_is_found_behind_a_wrapper(tmp_path, monkeypatch):
    version = (torch.version.cuda or "13.0").split(".")[0]
    real = make_nvcc(tmp_path / "toolkit", f'echo "#\\$ _HERE_=$(dirname "$0")" >&2; echo "release {version}.0,"')
    wrapper = make_nvcc(tmp_path / "elsewhere", f'exec {real} "$@"')
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}")
    assert native.cuda_home() == tmp_path / "toolkit"


def test_toolkit_of_another_version_is_refused(tmp_path, monkeypatch):
    make_nvcc(tmp_path, 'echo "release 9.2, V9.2.0"')
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(native.torch.version, "cuda", "13.0")
    with pytest.raises(native.NativeUnavailableError, match=r"is of CUDA 9, but this PyTorch of CUDA 13\.0"):
        native.cuda_home()


@needs_compiler
def test_cuda_library_builds_and_loads_without_a_device():
    if torch.version.cuda is None:
        pytest.skip("this PyTorch is built without CUDA")
    try:
        native.cuda_home()
    except native.NativeUnavailableError as error:
        pytest.skip(str(error))
    for path in native.build(cuda=True):
        torch.ops.load_library(path)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("vit_adapter::ms_deform_attn_backward", "CUDA")


@needs_compiler
def test_cached_library_loads_in_a_fraction_of_what_a_build_takes():
    native.build(cuda=False)
    script = (
        "import json, time, torch; from vit_adapter.kernels import native; start = time.process_time();"
        "native.use_native('cpu'); print(json.dumps(time.process_time() - start))"
    )
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert json.loads(output) < 1  # processor time; measured 0.03 s, a build takes more than ten


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_operator_passes_its_tests_on_lesser_processors(capability):
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this processor has no AVX2 to do without")
    command = [sys.executable, "-m", "pytest", "-q", Path(__file__).with_name("test_ms_deform_attn.py")]
    result = subprocess.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, capture_output=True)
    assert result.returncode == 0, result.stdout.decode()
