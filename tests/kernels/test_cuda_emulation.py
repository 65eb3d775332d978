"""The CUDA device code, emulated on the CPU, against the reference in float64; and that this check bites."""

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import vit_adapter.kernels.ms_deform_attn as operator
from vit_adapter.kernels.reference import ms_deform_attn_reference, ms_deform_attn_sample_reference

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulation with")

EMULATION = Path(__file__).parent / "emulation"
CSRC = Path(operator.__file__).parent / "csrc"
ELEMENTS = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
ORDERS = {"ascending": 0, "descending": 1, "permuted": 2}
FORWARD, BACKWARD, DETERMINISTIC = range(3)
# The greatest error relative to the greatest number: sums of a hundred float32 products; then one rounding to the
# storage type of the output (half a unit in the last place, 2^-11 and 2^-8 relative).
TOLERANCES = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Case(NamedTuple):
    """Sizes of a problem. No query grids: the general form, with this many queries."""

    source_grids: list[tuple[int, int]]
    query_grids: list[tuple[int, int]]
    heads: int
    channels: int
    points: int = 4
    batch: int = 2
    queries: int = 0


INJECTOR = Case([(6, 10), (3, 5), (2, 3)], [(3, 5)], heads=3, channels=64)
EXTRACTOR = Case([(3, 5)], [(6, 10), (3, 5), (2, 3)], heads=2, channels=32)
CASES = {
    "injector of ViT-S": INJECTOR,
    "injector of ViT-B": INJECTOR._replace(channels=32),
    "extractor of ViT-S": EXTRACTOR._replace(channels=64),
    "extractor of ViT-B": EXTRACTOR,
    "odd channels and points": Case([(4, 3), (1, 2)], [(3, 4)], heads=2, channels=37, points=3),
    "general form": INJECTOR._replace(query_grids=[], queries=17),
    "one query": Case([(4, 4)], [(1, 1)], heads=1, channels=32, points=4, batch=1),
}


class Inputs(NamedTuple):
    """What `operator.ms_deform_attn` takes, and the output's gradient."""

    value: Tensor
    places: Tensor
    weights: Tensor
    grad_output: Tensor


def make_inputs(case: Case, dtype: torch.dtype = torch.float32, single: bool = False) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(height * width for height, width in case.source_grids)
    queries = sum(height * width for height, width in case.query_grids) or case.queries
    shape = (case.batch, queries, case.heads, len(case.source_grids) * case.points)
    # Never on a pixel's centre, whatever the dtype: the gradient of places is one-sided there.
    places = (torch.randn(*shape, 2, generator=generator) * 2).floor() + 0.17
    if not case.query_grids:
        places = torch.rand(*shape, 2, generator=generator) * 1.6 - 0.3
    of_places = torch.float32 if single else dtype
    return Inputs(
        torch.randn(case.batch, tokens, case.heads, case.channels, generator=generator).to(dtype),
        places.to(of_places),
        torch.randn(shape, generator=generator).to(of_places),
        torch.randn(case.batch, queries, case.heads * case.channels, generator=generator).to(dtype),
    )


def expected(case: Case, inputs: Inputs) -> list[Tensor]:
    """Output and gradients of value, places and weights, by the reference in float64."""
    value, places, weights = (tensor.double().requires_grad_() for tensor in inputs[:3])
    if case.query_grids:
        output = ms_deform_attn_reference(value, places, weights, case.source_grids, case.query_grids, case.points)
    else:
        output = ms_deform_attn_sample_reference(value, places, weights, case.source_grids)
    output.backward(inputs.grad_output.double())
    return [output.detach(), value.grad, places.grad, weights.grad]


def to_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def run(
    program: Path, case: Case, inputs: Inputs, task: int, order: str = "ascending", aligned: bool = True
) -> list[Tensor]:
    """What the emulated kernel writes: the output, or the three gradients.

    Raises:
        subprocess.CalledProcessError: the emulation met what a GPU would not survive.
    """
    value, places, weights, grad_output = inputs
    single = places.dtype == torch.float32
    grids = [
        number for grids in (case.source_grids, case.query_grids) for number in (len(grids), *np.ravel(grids).tolist())
    ]
    header = [task, ORDERS[order], single, aligned, bool(case.query_grids), *value.shape[:2], places.shape[1]]
    header += [case.heads, case.channels, weights.shape[3], case.points, *map(int, grids)]
    bound = grad_output.abs().max().item() * places.shape[1]
    if not case.query_grids:
        bound *= weights.abs().max().item() * weights.shape[3]
    stdin = struct.pack(f"={len(header)}qf", *header, bound) + b"".join(map(to_bytes, inputs))
    stdout = subprocess.run([program], input=stdin, capture_output=True, check=True, timeout=120).stdout
    shapes = [grad_output.shape] if task == FORWARD else [tensor.shape for tensor in inputs[:3]]
    dtypes = [value.dtype] if task == FORWARD else [torch.float32, places.dtype, weights.dtype]
    results, begin = [], 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        size = shape.numel() * dtype.itemsize
        results.append(torch.frombuffer(bytearray(stdout[begin : begin + size]), dtype=dtype).view(shape))
        begin += size
    assert begin == len(stdout)
    return results


def errors(results: list[Tensor], truths: list[Tensor]) -> list[float]:
    """Greatest error of each, relative to the greatest number of the truth."""
    return [
        ((result.double() - truth).abs().max() / truth.abs().max()).nan_to_num(torch.inf).item()
        for result, truth in zip(results, truths, strict=True)
    ]


def compile_emulation(target: Path, element: str, architecture: int = 900, csrc: Path = CSRC) -> Path:
    """Compiles the kernels for one element type. The sanitizers stop at what a GPU would: unaligned packets."""
    flags = ["-std=c++20", "-O1", "-Wno-unknown-pragmas", "-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"]
    flags += [f"-I{EMULATION}", f"-I{csrc}", f"-D__CUDA_ARCH__={architecture}", f"-DELEMENT={element}"]
    subprocess.run(["g++", *flags, EMULATION / "emulated.cpp", "-o", target], check=True, timeout=300)
    return target


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Path]:
    """Compiles the emulation for a dtype on first use."""
    folder = tmp_path_factory.mktemp("emulation")

    def program(dtype: torch.dtype, architecture: int = 900) -> Path:
        path = folder / f"{ELEMENTS[dtype]}-{architecture}"
        return path if path.exists() else compile_emulation(path, ELEMENTS[dtype], architecture)

    return program


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_kernels_agree_with_the_reference(programs, name, dtype):
    case, inputs = CASES[name], make_inputs(CASES[name], dtype)
    output, *gradients = expected(case, inputs)
    assert max(errors(run(programs(dtype), case, inputs, FORWARD), [output])) < TOLERANCES[dtype]
    assert max(errors(run(programs(dtype), case, inputs, BACKWARD), gradients)) < TOLERANCES[dtype]


@pytest.mark.parametrize("name", ["injector of ViT-B", "odd channels and points"])
def test_half_precision_values_take_float32_offsets(programs, name):
    inputs = make_inputs(CASES[name], torch.bfloat16, single=True)
    gradients = run(programs(torch.bfloat16), CASES[name], inputs, BACKWARD)
    assert max(errors(gradients, expected(CASES[name], inputs)[1:])) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("order", ["descending", "permuted"])
@pytest.mark.parametrize("task", [FORWARD, BACKWARD])
def test_order_of_the_lanes_does_not_matter(programs, order, task):
    inputs = make_inputs(INJECTOR)
    truth = expected(INJECTOR, inputs)[:1] if task == FORWARD else expected(INJECTOR, inputs)[1:]
    assert max(errors(run(programs(torch.float32), INJECTOR, inputs, task, order), truth)) < TOLERANCES[torch.float32]


def test_deterministic_gradients_are_the_same_bits_in_every_order(programs):
    inputs = make_inputs(INJECTOR)
    first, second = (
        run(programs(torch.float32), INJECTOR, inputs, DETERMINISTIC, order) for order in ("ascending", "descending")
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert max(errors(first, expected(INJECTOR, inputs)[1:])) < TOLERANCES[torch.float32]


def test_deterministic_gradients_report_infinite_ones(programs):
    inputs = make_inputs(EXTRACTOR)
    inputs.grad_output[0, 0, 0] = torch.inf
    grad_value, *_ = run(programs(torch.float32), EXTRACTOR, inputs, DETERMINISTIC)
    assert not grad_value.isfinite().any()


def test_unaligned_values_take_the_general_kernel(programs):
    inputs = make_inputs(EXTRACTOR)
    result = run(programs(torch.float32), EXTRACTOR, inputs, BACKWARD, aligned=False)
    assert max(errors(result, expected(EXTRACTOR, inputs)[1:])) < TOLERANCES[torch.float32]


def test_architectures_before_9_add_number_by_number(programs):
    inputs = make_inputs(INJECTOR)
    result = run(programs(torch.float32, 800), INJECTOR, inputs, BACKWARD)
    assert max(errors(result, expected(INJECTOR, inputs)[1:])) < TOLERANCES[torch.float32]


# Defects to plant: what stands in the source, and what it becomes.
MUTANTS = {
    "no barrier after resolving": ("  }\n  __syncwarp();\n}", "  }\n}"),
    "no barrier before the softmax's gradient": ("  __syncwarp();\n\n  float mean", "\n  float mean"),
    "the wrong number exchanged": ("odd ? first : second", "odd ? second : first"),
    "a sum that leaves a level out": ("int distance = 4; distance", "int distance = 8; distance"),
    "a sum over half of the group": ("int distance = LANES / 2", "int distance = LANES / 4"),
    "a shuffle in a branch": ("mean = group_sum<V::LANES>(mean)", "if (work.live) mean = group_sum<V::LANES>(mean)"),
    "the wrong row": ("(corner >> 1) * sample.width", "(corner >> 1)"),
    "pixels outside": ("(pixel_of(place, corner, height, width) >= 0)", "1"),
    "groups beyond the last query": ("if (work.live) {\n            grad_value", "{\n            grad_value"),
    "the wrong level": ("problem.source.start[level] + place.y", "place.y"),
    "points before levels": ("level = i / problem.points", "level = i % problem.source.count"),
    "attention without its total": ("expf(weight - greatest) / total", "expf(weight - greatest)"),
    "attention's gradient without its mean": ("(gradients[3 * i] - mean)", "gradients[3 * i]"),
    "the last of four": ("factor * numbers[k + 3])", "factor * numbers[k + 2])"),
    "a coarse fixed point": ("exp2(61.0", "exp2(17.0"),
    "packets from unaligned memory": ("aligned && problem.channels == 32", "problem.channels == 32"),
    "x for y": ("(1 - place.right) * (bottom_left", "(1 - place.below) * (bottom_left"),
    "a pixel's corner for its centre": ("(index + A(0.5))", "(index + A(0))"),
}
QUICK_MUTANTS = ["no barrier after resolving", "the wrong number exchanged", "packets from unaligned memory"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK_MUTANTS else [pytest.mark.slow]) for name in MUTANTS]
)
def test_planted_defect_is_caught(tmp_path, name):
    text, defect = MUTANTS[name]
    (tmp_path / "csrc").mkdir()
    sources = {path.name: path.read_text() for path in (CSRC / "ms_deform_attn.cuh", CSRC / "sampling.h")}
    assert sum(text in source for source in sources.values()) == 1
    for file, source in sources.items():
        (tmp_path / "csrc" / file).write_text(source.replace(text, defect))
    program = compile_emulation(tmp_path / "mutant", "float", csrc=tmp_path / "csrc")

    def caught(case: Case, task: int, order: str = "ascending", aligned: bool = True) -> bool:
        inputs = make_inputs(case)
        truth = expected(case, inputs)
        try:
            results = run(program, case, inputs, task, order, aligned)
        except subprocess.CalledProcessError:
            return True
        return max(errors(results, truth[:1] if task == FORWARD else truth[1:])) > TOLERANCES[torch.float32]

    assert (
        caught(INJECTOR, FORWARD)
        or caught(INJECTOR, BACKWARD)
        or caught(INJECTOR, DETERMINISTIC)
        or caught(INJECTOR, BACKWARD, "descending")
        or caught(EXTRACTOR, BACKWARD, aligned=False)
    )
