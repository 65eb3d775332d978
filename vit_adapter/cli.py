"""The command `vit-adapter`: predict, evaluate, info, build-kernels, and what `vit_adapter.conversion` offers.

Exit codes: 0, 1 where weights do not cover a model, 2 where the input is at fault; then one sentence says why.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from .configuration.configuration_mask_rcnn import MaskRcnnConfig
from .conversion.__main__ import add_commands as add_conversion_commands
from .conversion.mapping import CoverageError
from .conversion.model_folder import new_file
from .kernels import native
from .modeling_vit_adapter.image_processing import MaskRcnnImageProcessor, load_image
from .modeling_vit_adapter.mask_rcnn import MaskRcnnForInstanceSegmentation

COVERAGE_BROKEN = 1
INPUT_AT_FAULT = 2

Detector = tuple[MaskRcnnForInstanceSegmentation, MaskRcnnImageProcessor]


def load_detector(model: str, device: str) -> Detector:
    """A detector and its image processor from a model folder or a Hub id.

    Raises:
        ValueError: There is no such model, its files are damaged or contradict each other, or it is no detector.
    """
    try:
        config = MaskRcnnConfig.get_config_dict(model)[0]
        if config.get("model_type") != MaskRcnnConfig.model_type:
            raise ValueError(f"{model}: the model is of type {config.get('model_type')}, but a detector was expected")
        loaded: Any = MaskRcnnForInstanceSegmentation.from_pretrained(
            model, output_loading_info=True, ignore_mismatched_sizes=True
        )
        detector, report = loaded  # a pair, with output_loading_info
        processor = MaskRcnnImageProcessor.from_pretrained(model)
    except (OSError, RuntimeError, StrictDataclassError, SafetensorError) as error:
        place = (
            "the model cannot be loaded" if Path(model).is_dir() else "no such folder, nor can it be had from the Hub"
        )
        raise ValueError(f"{model}: {place}: {' '.join(str(error).split())}") from error
    if report["mismatched_keys"]:
        name, stored, expected = min(report["mismatched_keys"])
        raise ValueError(
            f"{model}: {name} is stored as {tuple(stored)}, but config.json asks for {tuple(expected)}: the weights "
            f"belong to another configuration, or to another number of classes than {detector.config.num_labels}"
        )
    if incomplete := sorted(report["missing_keys"]):
        raise ValueError(
            f"{model}: the folder lacks {len(incomplete)} of the detector's tensors, {incomplete[0]} among them: "
            "train it first"
        )
    return detector.to(device).eval(), processor


def predict(arguments: argparse.Namespace) -> None:
    """Draws what a detector finds in pictures, and writes it as one COCO file."""
    from .training.visualization import draw_instances

    with tqdm(arguments.images, desc="checking") as paths:  # all, before anything is written
        for path in paths:
            load_image(path)
    detector, processor = load_detector(arguments.model, arguments.device)
    names = cast(dict[int, str], detector.config.id2label)
    arguments.out.mkdir(parents=True, exist_ok=True)
    pictures_of = Counter(path.stem for path in arguments.images)
    pictures: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, path in enumerate(tqdm(arguments.images, desc="predicting"), start=1):
        image = load_image(path)
        found = detect(detector, processor, image, arguments.threshold)
        pictures.append({"id": image_id, "file_name": str(path), "height": image.height, "width": image.width})
        for instance in found:
            place = {"id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0}
            annotations.append({**place, "area": area_of(instance), **instance})
        drawing = f"{path.stem}.png" if pictures_of[path.stem] == 1 else f"{path.stem}-{image_id}.png"
        draw_instances(image, found, names).save(arguments.out / drawing)
    categories = [{"id": label, "name": name} for label, name in names.items()]
    content = {"images": pictures, "categories": categories, "annotations": annotations}
    with new_file(arguments.out / "predictions.json") as unfinished:
        unfinished.write_text(json.dumps(content), encoding="utf-8")
    print(f"{len(annotations)} objects in {len(pictures)} pictures: {arguments.out}")


@torch.no_grad()
def detect(
    detector: MaskRcnnForInstanceSegmentation, processor: MaskRcnnImageProcessor, image: Any, threshold: float
) -> list[dict[str, Any]]:
    """COCO results of one picture with at least a score, best first; `category_id` is the model's class index."""
    inputs = processor(image, return_tensors="pt").to(detector.device)
    (found,) = processor.post_process_coco(detector(**inputs), [(image.height, image.width)])
    return [result for result in found if result["score"] >= threshold]


def area_of(instance: dict[str, Any]) -> int:
    """Pixels of a result's mask."""
    from pycocotools import mask as coco_mask

    return int(coco_mask.area(instance["segmentation"]))


def evaluate(arguments: argparse.Namespace) -> None:
    """Measures a detector's box and mask AP on a COCO data set, over all and for each class."""
    from .training.coco_evaluation import best_line, evaluate_results
    from .training.coco_evaluation import detect as detect_in_dataset
    from .training.coco_index import find_pictures, open_coco

    index = open_coco(arguments.annotations)
    root = find_pictures(index, arguments.images)
    detector, processor = load_detector(arguments.model, arguments.device)
    rows = range(len(index.pictures))
    with tqdm(total=len(rows), desc="evaluating") as bar:
        results = detect_in_dataset(
            detector, processor, index, root, rows=rows, device=arguments.device, seen=bar.update
        )
    metrics = evaluate_results(results, index)
    print(best_line(metrics))
    print("\n".join(per_class_lines(metrics)))
    if arguments.out is not None:
        with new_file(arguments.out) as unfinished:
            unfinished.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def per_class_lines(metrics: dict[str, Any]) -> list[str]:
    """Box and mask AP of each class that the data set has."""
    present = {name: value for name, value in metrics["box"]["per_class"].items() if value is not None}
    width = max(map(len, present), default=0)
    return [
        f"{name:{width}}  box AP {value:5.1f}  mask AP {metrics['mask']['per_class'][name]:5.1f}"
        for name, value in present.items()
    ]


def info(arguments: argparse.Namespace) -> None:
    """Says what a model is, and which implementation of the deformable attention runs here and why."""
    if arguments.model is not None:
        detector, processor = load_detector(arguments.model, "cpu")
        config: Any = detector.config  # transformers' types allow for configurations without classes
        backbone = config.backbone_config
        total, own = (sum(p.numel() for p in module.parameters()) for module in (detector, detector.backbone))
        size = processor.size
        print(f"{arguments.model}: Mask R-CNN on {backbone.model_type}")
        print(f"parameters     {total:,}, of these backbone {own:,}")
        print(f"classes        {config.num_labels}: {', '.join(config.id2label.values())}")
        print(f"pictures       short side {size['shortest_edge']}, long side at most {size['longest_edge']}")
        if provenance := getattr(backbone, "provenance", None) or getattr(config, "provenance", None):
            print(f"converted from {provenance.get('source', provenance)}")
    implementation, reason = native.describe()
    print(f"deformable attention: {implementation} ({reason})")


def build_kernels(arguments: argparse.Namespace) -> None:
    """Builds the native operator ahead of its first use."""
    for path in native.build(cuda=arguments.cuda or None):
        print(path)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="vit-adapter", description="Instance segmentation with ViT-Adapter.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = add_command(commands, "predict", predict)
    command.add_argument("model", help="a model folder or a Hub id")
    command.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    command.add_argument("--out", type=Path, required=True, help="folder for predictions.json and the drawn pictures")
    command.add_argument("--threshold", type=float, default=0.5, help="least score (default 0.5)")
    command.add_argument("--device", type=usable_device, default=default_device(), help="default here: %(default)s")

    command = add_command(commands, "evaluate", evaluate)
    command.add_argument("model", help="a model folder or a Hub id")
    command.add_argument("--annotations", type=Path, required=True, help="COCO JSON")
    command.add_argument("--images", type=Path, required=True, help="folder of its pictures")
    command.add_argument("--out", type=Path, help="write all numbers as JSON")
    command.add_argument("--device", type=usable_device, default=default_device(), help="default here: %(default)s")

    command = add_command(commands, "info", info)
    command.add_argument("model", nargs="?", help="a model folder or a Hub id")

    command = add_command(commands, "build-kernels", build_kernels)
    command.add_argument("--cuda", action="store_true", help="for CUDA as well, also where no GPU is visible")

    add_conversion_commands(commands)
    return parser


def add_command(commands: Any, name: str, run: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
    command.set_defaults(run=run)
    return command


def usable_device(name: str) -> str:
    """The name of a device, if it is there."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter from a PyTorch built without CUDA
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f'"{name}" is no device of this machine: {reason}') from error
    return name


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    transformers_logging.set_verbosity_error()  # what it would warn about, we check and say in one sentence
    parsed = build_parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except CoverageError as error:
        print(f"error: {error}", file=sys.stderr)
        return COVERAGE_BROKEN
    except (ValueError, OSError, native.NativeUnavailableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT_AT_FAULT
    return 0
