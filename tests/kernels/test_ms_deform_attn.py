"""The operator: the published numbers, the native kernels against the reference, derivatives, compilation, export."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional

from vit_adapter.kernels.ms_deform_attn import ms_deform_attn, ms_deform_attn_sample
from vit_adapter.kernels.native import describe, use_native

REFERENCE = Path(__file__).parents[1] / "reference"
SOURCE, QUERY = [(4, 6), (2, 3), (1, 2)], [(2, 3), (3, 5)]  # not square, ratios that are no powers of two
POINTS = 2
# The greatest error relative to the greatest number, by dtype of the value: sums of at most 48 products, then one
# rounding to the storage type (half a unit in the last place).
TOLERANCES = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(scope="module", autouse=True)
def native_is_built() -> None:
    if not use_native("cpu"):
        pytest.skip(describe("cpu").reason)


class Inputs(NamedTuple):
    """Arguments of `ms_deform_attn`."""

    value: Tensor
    offsets: Tensor
    logits: Tensor


def make_inputs(
    batch: int = 2, heads: int = 3, channels: int = 8, dtype: torch.dtype = torch.float32, spread: float = 2.0
) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    tokens, queries = cells(SOURCE), cells(QUERY)
    shape = (batch, queries, heads, len(SOURCE) * POINTS)
    return Inputs(
        torch.randn(batch, tokens, heads, channels, generator=generator).to(dtype),
        # Steps of a whole pixel plus 0.17 are never on a pixel's centre, where the gradient is one-sided.
        ((torch.randn(*shape, 2, generator=generator) * spread).floor() + 0.17).to(dtype),
        torch.randn(shape, generator=generator).to(dtype),
    )


def cells(grids: list[tuple[int, int]]) -> int:
    return sum(height * width for height, width in grids)


def run(inputs: Inputs, implementation: str = "native") -> Tensor:
    return ms_deform_attn(*inputs, SOURCE, QUERY, POINTS, implementation)


def with_gradients(inputs: Inputs, implementation: str = "native") -> list[Tensor]:
    """Output, and the gradients of value, offsets and logits for a fixed gradient of the output."""
    inputs = Inputs(*(tensor.detach().clone().requires_grad_() for tensor in inputs))
    output = run(inputs, implementation)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def assert_near(results: list[Tensor], truths: list[Tensor], tolerance: float) -> None:
    for result, truth in zip(results, truths, strict=True):
        assert result.shape == truth.shape
        assert (result.double() - truth.double()).abs().max() <= tolerance * truth.double().abs().max()


def reference_case(name: str) -> tuple[dict, dict[str, Tensor]]:
    return json.loads((REFERENCE / f"{name}.json").read_text()), load_file(REFERENCE / f"{name}.safetensors")


@pytest.mark.parametrize("implementation", ["native", "reference"])
@pytest.mark.parametrize("case", range(3))
def test_sampling_and_its_gradients_are_the_published_ones(case, implementation):
    facts, tensors = reference_case(f"ms_deform_attn_core_{case}")
    value, locations, weights = (
        tensors[name].requires_grad_() for name in ("value", "sampling_locations", "attention_weights")
    )
    grids = facts["spatial_shapes"]
    output = ms_deform_attn_sample(value, locations.flatten(3, 4), weights.flatten(3), grids, implementation)
    output.backward(tensors["grad_output"])
    for result, name in (
        (output, "output"),
        (value.grad, "grad_value"),
        (locations.grad, "grad_sampling_locations"),
        (weights.grad, "grad_attention_weights"),
    ):
        torch.testing.assert_close(result, tensors[name], atol=1e-10, rtol=0)


@pytest.mark.parametrize("implementation", ["native", "reference"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize("case", range(3))
def test_attention_with_published_projections_is_the_published_module(case, dtype, tolerance, implementation):
    facts, tensors = reference_case(f"ms_deform_attn_module_{case}")
    heads, levels, points = facts["n_heads"], facts["n_levels"], facts["n_points"]
    height, width = facts["image_hw"]
    strides = (16,) if levels == 3 else (8, 16, 32)  # injector, extractor

    def project(name: str, x: Tensor) -> Tensor:
        return functional.linear(x.to(dtype), *(tensors[f"w.{name}.{part}"].to(dtype) for part in ("weight", "bias")))

    output = ms_deform_attn(
        project("value_proj", tensors["feat"]).unflatten(-1, (heads, -1)),
        project("sampling_offsets", tensors["query"]).unflatten(-1, (heads, levels * points, 2)),
        project("attention_weights", tensors["query"]).unflatten(-1, (heads, levels * points)),
        facts["spatial_shapes"],
        [(height // stride, width // stride) for stride in strides],
        points,
        implementation,
    )
    expected = tensors["output" if dtype == torch.float32 else "output_float64"]
    torch.testing.assert_close(project("output_proj", output), expected, atol=tolerance, rtol=0)


# Multiples of the widest vector and of four numbers, and neither; more than four vectors; a single channel.
@pytest.mark.parametrize("channels", [64, 32, 16, 8, 100, 20, 5, 1])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_native_agrees_with_the_reference_in_float64(channels, dtype):
    inputs = make_inputs(channels=channels, dtype=dtype)
    truth = with_gradients(Inputs(*(tensor.double() for tensor in inputs)), "reference")
    assert_near(with_gradients(inputs), truth, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_offsets_and_logits_may_be_float32_beside_another_value(dtype):
    value, offsets, logits = make_inputs()
    inputs = Inputs(value.to(dtype), offsets, logits)
    results = with_gradients(inputs)
    assert [result.dtype for result in results] == [dtype, dtype, torch.float32, torch.float32]
    truth = with_gradients(Inputs(*(tensor.double() for tensor in inputs)), "reference")
    assert_near(results, truth, max(TOLERANCES[dtype], 1e-7))  # the gradients of float32 inputs are float32


def test_half_precision_numbers_are_read_exactly():
    # One query on the centre of the only pixel, one sample: the output is the value. Subnormal and special included.
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    zeros = torch.zeros(1, 1, 1, 1, 2)
    result = ms_deform_attn(numbers[None, None, None], zeros, zeros[..., 0], [(1, 1)], [(1, 1)], 1, "native")
    finite = numbers.isfinite() & (numbers != 0)
    assert torch.equal(result.flatten()[finite], numbers[finite])
    assert not result.flatten()[~numbers.isfinite()].isfinite().any()


def test_gradients_are_the_derivatives():
    inputs = make_inputs(batch=1, heads=2, channels=3, dtype=torch.float64)
    assert gradcheck(lambda *tensors: run(Inputs(*tensors)), [tensor.requires_grad_() for tensor in inputs], eps=1e-6)


def test_gradients_of_sampling_are_the_derivatives():
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, cells(SOURCE), 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    locations = torch.rand(1, 4, 2, 6, 2, dtype=torch.float64, generator=generator) * 1.6 - 0.3
    weights = torch.randn(1, 4, 2, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    arguments = value, locations.requires_grad_(), weights
    assert gradcheck(lambda *tensors: ms_deform_attn_sample(*tensors, SOURCE, "native"), arguments, eps=1e-6)


def test_second_derivatives_are_refused():
    inputs = Inputs(*(tensor.requires_grad_() for tensor in make_inputs()))
    (grad,) = torch.autograd.grad(run(inputs).square().sum(), inputs.value, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own
def test_operators_keep_pytorchs_rules():
    inputs = Inputs(*(tensor.requires_grad_() for tensor in make_inputs(channels=4)))
    grids = [size for grid in SOURCE for size in grid], [size for grid in QUERY for size in grid]
    torch.library.opcheck(torch.ops.vit_adapter.ms_deform_attn.default, (*inputs, *grids, POINTS))
    locations = inputs.offsets.detach().sigmoid().requires_grad_()
    arguments = inputs.value, locations, inputs.logits, grids[0]
    torch.library.opcheck(torch.ops.vit_adapter.ms_deform_attn_sample.default, arguments)


def test_results_are_the_same_bits_again_and_on_one_thread():
    inputs = make_inputs(heads=5, channels=32)
    first = with_gradients(inputs)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = with_gradients(inputs)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, with_gradients(inputs), alone))  # noqa: B905


def test_a_batch_gives_what_its_pictures_give():
    inputs = make_inputs(batch=3)
    batch = with_gradients(inputs)[0]
    for i in range(3):
        assert torch.equal(run(Inputs(*(tensor[i : i + 1] for tensor in inputs))), batch[i : i + 1])


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_an_empty_batch_and_no_queries_give_empty_outputs(implementation):
    assert with_gradients(make_inputs(batch=0), implementation)[0].shape == (0, cells(QUERY), 24)
    value, offsets, logits = make_inputs()
    output = ms_deform_attn(value, offsets[:, :0], logits[:, :0], SOURCE, [(0, 3)], POINTS, implementation)
    assert output.shape == (2, 0, 24)


def test_strides_of_the_inputs_do_not_matter():
    inputs = make_inputs()
    scattered = Inputs(*(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs))
    assert not scattered.value.is_contiguous()
    assert torch.equal(run(scattered), run(inputs))


def test_places_far_outside_contribute_nothing():
    value, offsets, logits = make_inputs()
    for far in (1e3, -1e3, 1e30, float("inf"), float("nan")):
        results = with_gradients(Inputs(value, torch.full_like(offsets, far), logits))
        assert not any(result.any() for result in results)


def test_infinite_pixels_outside_the_samples_do_no_harm():
    value, offsets, logits = make_inputs(channels=5)
    value[:, 0] = float("inf")  # the first pixel of the finest level
    offsets = offsets.clamp(min=2)
    assert run(Inputs(value, offsets, logits)).isfinite().all()


def test_missing_logits_make_missing_numbers():
    value, offsets, logits = make_inputs()
    logits[0, 0, 0, 1] = float("nan")
    output = run(Inputs(value, offsets, logits)).unflatten(-1, (3, 8))
    assert output[0, 0, 0].isnan().all() and output.isnan().sum() == 8


def test_great_logits_do_not_overflow():
    value, offsets, logits = make_inputs()
    inputs = Inputs(value, offsets, logits * 100)
    assert_near(with_gradients(inputs)[:1], with_gradients(inputs, "reference")[:1], 1e-5)


class Operator(torch.nn.Module):
    """The operator over a picture of any size: 1/8 and 1/16 of it as source, 1/16 as queries."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        self.implementation = implementation

    def forward(self, picture: Tensor, weight: Tensor) -> Tensor:
        height, width = picture.shape[2:]
        grids = [(height // 8, width // 8), (height // 16, width // 16)]
        levels = [functional.adaptive_avg_pool2d(picture, grid).flatten(2).transpose(1, 2) for grid in grids]
        queries = functional.linear(levels[1], weight).unflatten(-1, (2, 4, 3))
        return ms_deform_attn(
            torch.cat(levels, 1).unflatten(-1, (2, 4)), queries[..., :2], queries[..., 2], grids, grids[1:], 2,
            self.implementation,
        )  # fmt: skip


def picture_and_weight(height: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 8, height, width, generator=generator), torch.randn(24, 8, generator=generator)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the compiler's own modules
@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_compiles_whole_for_every_size(implementation):
    torch.compiler.reset()
    module = Operator(implementation)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((64, 96), (96, 160)):
        picture, weight = (tensor.requires_grad_() for tensor in picture_and_weight(*size))
        expected, result = module(picture, weight), compiled(picture, weight)
        torch.testing.assert_close(result, expected)
        for a, b in zip(
            torch.autograd.grad(expected.square().sum(), (picture, weight)),
            torch.autograd.grad(result.square().sum(), (picture, weight)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def exported(implementation: str) -> torch.export.ExportedProgram:
    sides = {2: 32 * torch.export.Dim("height", max=40), 3: 32 * torch.export.Dim("width", max=40)}
    return torch.export.export(
        Operator(implementation), picture_and_weight(64, 96), dynamic_shapes={"picture": sides, "weight": None}
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("implementation, native", [("auto", False), ("native", True)])
def test_exports_in_pytorchs_operators_unless_native_is_asked_for(implementation, native):
    program = exported(implementation)
    assert ("vit_adapter" in str(program.graph)) == native
    inputs = picture_and_weight(96, 160)
    torch.testing.assert_close(program.module()(*inputs), Operator("reference")(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_autocast_leaves_mixed_inputs_alone(implementation):
    value, offsets, logits = make_inputs()
    inputs = Inputs(value.bfloat16(), offsets, logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(inputs, implementation)
    assert torch.equal(inside, run(inputs, implementation))


@pytest.mark.parametrize("implementation", ["native", "reference"])
@pytest.mark.parametrize(
    "change, text",
    [
        ({"source_grids": SOURCE[:2]}, "source_grids hold 30 cells, but value has 32 tokens"),
        ({"query_grids": QUERY[:1]}, "query_grids hold 6 cells, but offsets have 21 queries"),
        ({"points": 3}, "3 levels of 3 points need 9 offsets a head, but got 6"),
        ({"value": torch.zeros(2, 32, 24)}, r"value must be \(batch, tokens, heads, channels\)"),
        ({"logits": torch.zeros(2, 21, 3, 5)}, "an \\(x, y\\) for each"),
        ({"logits": torch.zeros(2, 21, 4, 6)}, "one weight for every"),
        ({"implementation": "fast"}, "implementation must be one of auto, native, reference, but got 'fast'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, text, implementation):
    arguments = {**make_inputs()._asdict(), "source_grids": SOURCE, "query_grids": QUERY, "points": POINTS}
    with pytest.raises(ValueError, match=text):
        ms_deform_attn(**{**arguments, "implementation": implementation, **change})


def test_more_samples_than_the_kernels_hold_are_refused():
    value, query = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 65, 2)
    with pytest.raises(ValueError, match="1 to 64 samples"):
        ms_deform_attn(value, query, query[..., 0], [(1, 1)], [(1, 1)], 65, "native")


# Devices: what the emulation cannot show.

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@gpu
@needs_cuda
@pytest.mark.parametrize("channels", [64, 32, 16, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cuda_agrees_with_the_reference_in_float64(channels, dtype):
    inputs = make_inputs(channels=channels, dtype=dtype)
    truth = with_gradients(Inputs(*(tensor.double() for tensor in inputs)), "reference")
    results = with_gradients(Inputs(*(tensor.cuda() for tensor in inputs)))
    assert_near([result.cpu() for result in results], truth, TOLERANCES[dtype])


@gpu
@needs_cuda
def test_cuda_is_deterministic_where_asked():
    inputs = Inputs(*(tensor.cuda() for tensor in make_inputs(batch=8, channels=64)))
    try:
        torch.use_deterministic_algorithms(True)
        first, second = with_gradients(inputs), with_gradients(inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_near(first, with_gradients(inputs), TOLERANCES[torch.float32])


@gpu
@needs_cuda
def test_cuda_runs_in_a_graph_and_on_another_stream():
    inputs = Inputs(*(tensor.cuda() for tensor in make_inputs(channels=64)))
    expected = run(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(inputs)
    result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result, expected)


@gpu
@needs_cuda
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own
def test_cuda_passes_the_sanitizer_of_operators():
    inputs = Inputs(*(tensor.cuda().requires_grad_() for tensor in make_inputs(channels=64)))
    grids = [size for grid in SOURCE for size in grid], [size for grid in QUERY for size in grid]
    torch.library.opcheck(torch.ops.vit_adapter.ms_deform_attn.default, (*inputs, *grids, POINTS), atol=1e-4)
