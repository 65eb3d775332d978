"""Time and memory of deformable attention: native, its reference, and transformers' module, in one run.

    python benchmarks/ms_deform_attn.py [--rounds 3] [--device cuda] [--dtype bfloat16] [--quick]

Shapes are those of one interaction of ViT-Adapter with DINOv2-S, -B and -L. Offsets spread by 3 pixels. The three
implementations take turns of a few calls, so that a busy machine slows all alike, and the median of each counts. A
turn's first call does not: it finds the caches full of another implementation's data, where in a model the value comes
fresh from its projection. Memory is the greatest growth of the process during one forward and backward pass, on a GPU
that of the allocator.
On a GPU the last column is the fraction of the time that the unavoidable traffic takes at the memory's bandwidth.
"""

import argparse
import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from vit_adapter.kernels import native
from vit_adapter.kernels.ms_deform_attn import ms_deform_attn

MODELS = {"S": (6, 64), "B": (12, 32), "L": (16, 32)}  # heads, channels of a head
SIZES = [(512, 512), (800, 1216), (1024, 1024)]
POINTS = 4
CALLS_OF_A_TURN = 3
IMPLEMENTATIONS = ("native", "reference", "transformers")


class Case(NamedTuple):
    """One call: the injector's or the extractor's of a model on a picture of some size."""

    model: str
    height: int
    width: int
    part: str

    def grids(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Source and query grids: the pyramid of the prior and the grid of the ViT, or the other way round."""
        prior = [(self.height // stride, self.width // stride) for stride in (8, 16, 32)]
        vit = prior[1:2]
        return (prior, vit) if self.part == "injector" else (vit, prior)


class Problem(NamedTuple):
    """The tensors of a case, and the output's gradient."""

    value: Tensor
    offsets: Tensor
    logits: Tensor
    grad_output: Tensor


def make_problem(case: Case, device: str, dtype: torch.dtype) -> Problem:
    heads, channels = MODELS[case.model]
    source, query = case.grids()
    tokens, queries = (sum(height * width for height, width in grids) for grids in (source, query))
    shape = (1, queries, heads, len(source) * POINTS)
    torch.manual_seed(0)
    numbers = torch.randn(1, tokens, heads, channels), torch.randn(*shape, 2) * 3, torch.randn(shape)
    inputs = [tensor.to(device, dtype).requires_grad_() for tensor in numbers]
    return Problem(*inputs, torch.randn(1, queries, heads * channels).to(device, dtype))


def transformers_attention(
    value: Tensor,
    offsets: Tensor,
    logits: Tensor,
    source: list[tuple[int, int]],
    query: list[tuple[int, int]],
) -> Tensor:
    """The same through transformers' module, which wants locations and weights, made here as its models make them."""
    centres = []
    for height, width in query:
        y, x = torch.meshgrid(
            (torch.arange(height, device=value.device) + 0.5) / height,
            (torch.arange(width, device=value.device) + 0.5) / width,
            indexing="ij",
        )
        centres.append(torch.stack((x, y), -1).flatten(0, 1))
    sizes = torch.tensor([(width, height) for height, width in source], device=value.device, dtype=value.dtype)
    offsets = offsets.unflatten(3, (len(source), POINTS))
    locations = torch.cat(centres).to(value.dtype)[:, None, None, None] + offsets / sizes[:, None]
    weights = logits.softmax(-1).unflatten(3, (len(source), POINTS))
    shapes = torch.tensor(source, device=value.device)
    return MultiScaleDeformableAttention()(value, shapes, source, None, locations, weights, 64)


def forward(implementation: str, case: Case, problem: Problem) -> Tensor:
    if implementation == "transformers":
        return transformers_attention(*problem[:3], *case.grids())
    return ms_deform_attn(*problem[:3], *case.grids(), POINTS, implementation)


def forward_only(implementation: str, case: Case, problem: Problem) -> None:
    with torch.no_grad():
        forward(implementation, case, problem)


def forward_and_backward(implementation: str, case: Case, problem: Problem) -> None:
    torch.autograd.grad(forward(implementation, case, problem), problem[:3], problem.grad_output)


def milliseconds(function: Callable[[], None], device: str) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


def interleaved(functions: list[Callable[[], None]], rounds: int, device: str) -> list[float]:
    """Median milliseconds of each function over turns of one call that does not count and some that do."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for measured, function in zip(times, functions, strict=True):
            function()
            measured += [milliseconds(function, device) for _ in range(CALLS_OF_A_TURN)]
    return [statistics.median(measured) for measured in times]


def peak_megabytes(implementation: str, case: Case, problem: Problem) -> float:
    """Growth of memory over what the inputs take, at most, in one forward and backward pass."""
    if problem.value.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_and_backward(implementation, case, problem)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system, so that its use anew is seen
    Path("/proc/self/clear_refs").write_text("5")  # sets the greatest size to the present one
    before = resident_megabytes("VmHWM")
    forward_and_backward(implementation, case, problem)
    return resident_megabytes("VmHWM") - before


def resident_megabytes(field: str) -> float:
    """A size of this process as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1.024e-3


def traffic_gigabytes(problem: Problem) -> tuple[float, float]:
    """What must cross the memory's pins at least, forward and forward with backward: every number once."""
    inputs = sum(tensor.nbytes for tensor in problem[:3])
    output = problem.grad_output.nbytes
    forward_bytes = inputs + output
    # Backward reads everything again with the output's gradient, sums value's in float32 and writes all gradients.
    backward_bytes = inputs + output + inputs + 2 * 4 * problem.value.numel()
    return forward_bytes / 1e9, (forward_bytes + backward_bytes) / 1e9


@functools.cache
def bandwidth() -> float:
    """Gigabytes a second that this GPU moves in a large copy."""
    source = torch.empty(2**28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    (duration,) = interleaved([lambda: target.copy_(source)], 10, "cuda")
    return 2 * source.nbytes / duration / 1e6


def rows(cases: list[Case], rounds: int, device: str, dtype: torch.dtype) -> Iterator[list[str]]:
    for case in cases:
        problem = make_problem(case, device, dtype)
        cells = [f"ViT-{case.model}", f"{case.height}x{case.width}", case.part]
        limits = []
        for work, gigabytes in zip((forward_only, forward_and_backward), traffic_gigabytes(problem), strict=True):
            ours, reference, theirs = interleaved(
                [functools.partial(work, implementation, case, problem) for implementation in IMPLEMENTATIONS],
                rounds,
                device,
            )
            cells += [f"{ours:.2f}", f"{reference / ours:.1f}x", f"{theirs / ours:.1f}x"]
            if device == "cuda":
                limits.append(f"{gigabytes / bandwidth() * 1e3 / ours:.0%}")
        memory = [peak_megabytes(name, case, problem) for name in ("native", "reference")]
        yield [*cells, f"{memory[0]:.0f}", f"{memory[1] / memory[0]:.1f}x", *limits]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--quick", action="store_true", help="800x1216 only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    if not native.use_native(arguments.device):
        raise SystemExit(native.describe(arguments.device).reason)

    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} threads"
    print(f"{where}, {arguments.dtype}, PyTorch {torch.__version__}, medians of {arguments.rounds} rounds")
    header = ["model", "picture", "part", "fwd ms", "ref", "transf.", "f+b ms", "ref", "transf.", "f+b MB", "ref"]
    header += ["fwd limit", "f+b limit"] if arguments.device == "cuda" else []
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    sizes = SIZES[1:2] if arguments.quick else SIZES
    cases = [Case(model, *size, part) for model in MODELS for size in sizes for part in ("injector", "extractor")]
    for row in rows(cases, arguments.rounds, arguments.device, dtype):
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
