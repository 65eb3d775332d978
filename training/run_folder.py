"""The output folder of a run: what is in it, who may write there, and how it is filled.

`recipe.json`, `checkpoints/`, `metrics.jsonl` while training; `model/` (what `from_pretrained` reads),
`loss_curve.png`, `predictions/` and, last of all, `metrics.json`.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from PIL import Image
from transformers import PreTrainedModel

from vit_adapter.conversion.model_card import CITATION, DETECTOR_USAGE
from vit_adapter.conversion.model_folder import new_file, new_folder
from vit_adapter.modeling_vit_adapter.image_processing import MaskRcnnImageProcessor
from vit_adapter.training.checkpointing import newest_checkpoint
from vit_adapter.training.coco_evaluation import best_line
from vit_adapter.training.coco_index import CocoIndex, read_picture
from vit_adapter.training.recipe import Recipe
from vit_adapter.training.visualization import draw_instances, draw_loss_curve, side_by_side

# Settings that may change when an unfinished run is continued.
FREE_SETTINGS = {
    *("name", "note", "output_dir", "overwrite", "cache_dir", "num_workers", "cpu_threads", "log_every_steps"),
    *("checkpoint_every_steps", "keep_checkpoints", "evaluate_every_epochs", "evaluate_on_train"),
    *("draw_pictures", "draw_threshold"),
}


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.lines = path / "metrics.jsonl"
        self.metrics = path / "metrics.json"
        self.model = path / "model"
        self.predictions = path / "predictions"
        self.loss_curve = path / "loss_curve.png"
        self.recipe = path / "recipe.json"

    def prepare(self, recipe: Recipe) -> None:
        """Makes the folder ready for a new run or for going on with an unfinished one.

        Raises:
            ValueError: it cannot be written, or holds a finished run or one of another recipe.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if recipe.overwrite:
                self._clear()
            if self.metrics.exists():
                raise ValueError(
                    f"{self.path}: there is a finished run: choose another --output_dir, or add --overwrite true"
                )
            if newest_checkpoint(self.checkpoints) is None:
                self._clear()
            elif self.recipe.exists():
                self._check_same(recipe)
            self.recipe.write_text(json.dumps(recipe.as_dict(), indent=2) + "\n")
        except OSError as error:
            raise ValueError(f"{self.path}: the output folder cannot be written ({error.strerror})") from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        with self.lines.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in self.lines.read_text().splitlines()] if self.lines.exists() else []

    def forget_after(self, step: int) -> None:
        """Drops the lines of steps that a resumed run will do again."""
        kept = [record for record in self.records() if record["step"] <= step]
        self.lines.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def save_model(self, model: PreTrainedModel, processor: MaskRcnnImageProcessor, card: str) -> None:
        """Writes the model folder, whole or not at all."""
        shutil.rmtree(self.model, ignore_errors=True)
        with new_folder(self.model) as unfinished:
            model.save_pretrained(unfinished)
            processor.save_pretrained(unfinished)
            (unfinished / "README.md").write_text(card)

    def draw_losses(self) -> None:
        """Draws the loss curve from metrics.jsonl."""
        draw_loss_curve([record for record in self.records() if "loss" in record], self.loss_curve)

    def draw_predictions(
        self,
        name: str,
        index: CocoIndex,
        root: Path,
        results: Sequence[Mapping[str, Any]],
        *,
        count: int,
        threshold: float,
    ) -> None:
        """Draws the first pictures of a set with the truth and what was found, side by side."""
        folder = self.predictions / name
        folder.mkdir(parents=True, exist_ok=True)
        for row_number in range(min(count, len(index.pictures))):
            row = index.pictures[row_number]
            image = Image.fromarray(read_picture(root, row).permute(1, 2, 0).numpy())
            truth = [
                {
                    "category_id": category_id,
                    "bbox": box,
                    "segmentation": {"size": [row["height"], row["width"]], "counts": counts},
                }
                for category_id, box, counts in zip(row["category_ids"], row["boxes"], row["run_lengths"], strict=True)
            ]
            found = [r for r in results if r["image_id"] == row_number and r["score"] >= threshold]
            pair = side_by_side(
                [draw_instances(image, truth, index.categories), draw_instances(image, found, index.categories)],
                ["ground truth", f"predicted (score at least {threshold:g})"],
            )
            pair.save(folder / f"{Path(row['file_name']).stem}.png")

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Writes metrics.json, which marks the run as finished."""
        with new_file(self.metrics) as unfinished:
            unfinished.write_text(json.dumps(metrics, indent=2) + "\n")

    def _clear(self) -> None:
        for folder in (self.checkpoints, self.model, self.predictions):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.metrics, self.lines, self.loss_curve, self.recipe):
            file.unlink(missing_ok=True)

    def _check_same(self, recipe: Recipe) -> None:
        before, now = json.loads(self.recipe.read_text()), recipe.as_dict()
        changed = [name for name in now if name not in FREE_SETTINGS and before.get(name) != now[name]]
        if changed:
            differences = ", ".join(f"{name} {before.get(name)!r} -> {now[name]!r}" for name in changed)
            raise ValueError(
                f"{self.path}: there is an unfinished run with other settings ({differences}): choose another "
                "--output_dir, or add --overwrite true"
            )


def model_card(name: str, recipe: Recipe, evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """README.md of a trained model's folder; `name` is how the snippet names the model."""
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["vit-adapter", "mask-rcnn", "instance-segmentation", "object-detection"],
    )
    start = f"the preset `{recipe.preset}`" if recipe.preset is not None else f"the detector `{recipe.model}`"
    weights = recipe.backbone_weights.name if recipe.backbone_weights is not None else "random"
    accuracy = [f"- {set_name}: {best_line(metrics)}" for set_name, metrics in evaluations.items()]
    import_line = "import vit_adapter  # registers the classes with transformers\n"
    return "\n".join(
        [
            f"---\n{metadata.to_yaml()}\n---\n",
            f"# {name}\n",
            "Instance segmentation by Mask R-CNN with a ViT-Adapter backbone.\n",
            "## Use\n",
            f"```python\n{DETECTOR_USAGE.format(name=name, trust='', import_line=import_line)}```\n",
            "## Training\n",
            f"By the recipe `{recipe.name}`, from {start}"
            + (f" with {weights} weights.\n" if recipe.preset else ".\n"),
            "## Accuracy in percent\n",
            *(accuracy or ["Not measured."]),
            f"\n{recipe.note}\n" if recipe.note else "",
            f"## Citation\n\n```bibtex\n{CITATION}```\n",
        ]
    )
