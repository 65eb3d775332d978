"""A recipe: everything that a training run depends on, as a YAML file with overrides from the command line.

`extends: other.yaml` takes over the settings of another recipe, a file beside it.
"""

import difflib
import inspect
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from vit_adapter.configuration.presets import PRESETS
from vit_adapter.training.augmentation import parse_steps


@dataclass
class Recipe:
    """What to train, on what, and how. Paths in the file count from the file's folder, on the command line from here.

    note: A remark on the results, shown with them and in the model card.

    Model:
        preset: Row of `vit_adapter.configuration.presets` that the model is built after.
        backbone, detector: Fields of the configurations that differ from the preset's.
        backbone_weights: Pre-trained weights of the backbone, in any form that `vit-adapter convert` reads.
        model: Folder of a trained detector to start from, in place of a preset.
        replace_classes: Whether a started-from detector with other classes gets new class layers.
        gradient_checkpointing: Less memory for a third more time.

    Data (COCO):
        train_annotations, train_images, val_annotations, val_images: Annotation files and picture folders.
        keep_background: Whether pictures without annotations are trained on.
        cache_dir: Where the index of the annotations is kept.
        num_workers: Processes that load pictures, for each training process.
        augmentation: Steps, see `vit_adapter.training.augmentation`.
        image_mean, image_std: Normalisation of RGB in 0 to 255 in training, where it differs from the preset's.

    Optimization:
        num_epochs, max_steps: Length of the run; the smaller holds.
        total_batch_size: Pictures of one optimizer step over all processes.
        batch_size: Pictures of one process at a time; the rest is accumulated.
        learning_rate, weight_decay, layer_decay_rate, reference_quirks: See `optimization.parameter_groups`.
        lr_decay_epochs, lr_decay_factor, warmup_steps, warmup_ratio: See `optimization.learning_rate_factor`.
        gradient_clip_norm: Largest norm of the gradient.
        freeze_batch_norm_epoch: From this epoch on, batch norms apply their running statistics and keep them, as in
            evaluation. With a picture or two at a time, a model otherwise comes to rely on the statistics of the
            very picture, which it does not have in evaluation.
        mixed_precision: bf16 or fp16.
        seed: Of every random draw.
        cpu_threads: Threads of a process without a GPU; otherwise the cores are shared out evenly.

    Course:
        output_dir: Where everything is written; otherwise runs/ and the recipe's name, from here.
        overwrite: Whether a run in output_dir is replaced; otherwise an unfinished one is continued.
        log_every_steps: Steps from line to line of metrics.jsonl.
        checkpoint_every_steps: Steps from checkpoint to checkpoint; an epoch if not given.
        keep_checkpoints: How many of the newest stay.
        evaluate_every_epochs: Epochs from evaluation to evaluation; otherwise only at the end.
        evaluate_on_train: Whether the training pictures are evaluated too.
        eval_short_side, eval_long_side: Size of pictures in evaluation and in the saved image processor.
        draw_pictures: How many pictures of each evaluated set are drawn at the end.
        draw_threshold: Least score of a drawn detection.
    """

    train_annotations: Path
    train_images: Path
    augmentation: list[Any]
    name: str = "recipe"
    note: str | None = None

    preset: str | None = None
    backbone: dict[str, Any] = field(default_factory=dict)
    detector: dict[str, Any] = field(default_factory=dict)
    backbone_weights: Path | None = None
    model: Path | None = None
    replace_classes: bool = False
    gradient_checkpointing: bool = False

    val_annotations: Path | None = None
    val_images: Path | None = None
    keep_background: bool = False
    cache_dir: Path | None = None
    num_workers: int = 2
    image_mean: list[float] | None = None
    image_std: list[float] | None = None

    num_epochs: int = 36
    max_steps: int | None = None
    total_batch_size: int = 16
    batch_size: int = 2
    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    layer_decay_rate: float | None = None
    reference_quirks: bool = True
    lr_decay_epochs: list[int] = field(default_factory=list)
    lr_decay_factor: float = 0.1
    warmup_steps: int = 500
    warmup_ratio: float = 0.001
    gradient_clip_norm: float | None = None
    freeze_batch_norm_epoch: int | None = None
    mixed_precision: str | None = None
    seed: int = 0
    cpu_threads: int | None = None

    output_dir: Path | None = None
    overwrite: bool = False
    log_every_steps: int = 50
    checkpoint_every_steps: int | None = None
    keep_checkpoints: int = 3
    evaluate_every_epochs: int | None = 1
    evaluate_on_train: bool = False
    eval_short_side: int = 800
    eval_long_side: int = 1333
    draw_pictures: int = 8
    draw_threshold: float = 0.5

    def __post_init__(self) -> None:
        if (self.preset is None) == (self.model is None):
            raise ValueError("a recipe names either a preset or a model to start from: give one of the two")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"there is no preset {self.preset!r}{_near(self.preset, PRESETS)}")
        if (self.val_annotations is None) != (self.val_images is None):
            raise ValueError("val_annotations and val_images belong together: give both or neither")
        if self.mixed_precision not in (None, "bf16", "fp16"):
            raise ValueError(f"mixed_precision is {self.mixed_precision!r}, but bf16, fp16 or null was expected")
        smallest = {
            1: ("num_epochs", "max_steps", "total_batch_size", "batch_size", "log_every_steps", "keep_checkpoints"),
            0: ("num_workers", "warmup_steps", "seed", "draw_pictures", "learning_rate", "weight_decay"),
        }
        for bound, names in smallest.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and value < bound:
                    raise ValueError(f"{name} is {value}, but at least {bound} was expected")
        for name in ("checkpoint_every_steps", "evaluate_every_epochs", "eval_short_side", "eval_long_side"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but at least 1 was expected")
        if self.total_batch_size % self.batch_size:
            raise ValueError(
                f"total_batch_size {self.total_batch_size} is no multiple of batch_size {self.batch_size}: "
                "give sizes that divide"
            )
        parse_steps(self.augmentation)

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain values, as YAML and JSON hold them."""
        plain = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}


SETTINGS = inspect.cleandoc(Recipe.__doc__ or "")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file.

    Args:
        overrides: `--name value` or `--name=value`, the value in YAML's notation (`null`, `1e-4`, `[27, 33]`).

    Raises:
        ValueError: a file is missing, a name unknown or a value of the wrong kind; the sentence says which.
    """
    path = Path(path)
    values = {"name": path.stem, **_file_values(path), **_checked("command line", _parsed(overrides), Path())}
    missing = [entry.name for entry in fields(Recipe) if _is_required(entry) and entry.name not in values]
    if missing:
        raise ValueError(f"{path}: the recipe does not say {', '.join(missing)}")
    try:
        return Recipe(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _file_values(path: Path) -> dict[str, Any]:
    """The checked settings of a file, after those of the file that it extends."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such recipe")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a recipe consists of lines `name: value`, but this holds {content!r}")
    extended = content.pop("extends", None)
    if extended is None:
        return _checked(str(path), content, path.parent)
    if (path.parent / str(extended)).resolve() == path.resolve():
        raise ValueError(f"{path}: the recipe extends itself")
    return {**_file_values(path.parent / str(extended)), **_checked(str(path), content, path.parent)}


def _checked(source: str, given: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Settings as the kinds that the recipe declares; paths count from `root`."""
    kinds = get_type_hints(Recipe)
    for name in given:
        if name not in kinds:
            raise ValueError(f"{source}: there is no setting {name!r}{_near(str(name), kinds)}")
    return {name: _typed(f"{source}: {name}", value, kinds[name], root) for name, value in given.items()}


def _parsed(overrides: Sequence[str]) -> dict[str, Any]:
    """`--name value` pairs as a mapping."""
    given = {}
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"command line: a setting is written --name value, but got {word!r}")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise ValueError(f"command line: --{name} needs a value")
            value = words.pop(0)
        try:
            given[name.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"command line: --{name} cannot be read: {' '.join(str(error).split())}") from error
    return given


def _typed(what: str, value: Any, kind: Any, root: Path) -> Any:
    """The value as the kind that a field is declared as."""
    if get_origin(kind) in (Union, types.UnionType):
        if value is None:
            return None
        kind = next(option for option in get_args(kind) if option is not type(None))
    if get_origin(kind) is list and isinstance(value, list):
        (entry_kind,) = get_args(kind)
        return [entry if entry_kind is Any else _typed(what, entry, entry_kind, root) for entry in value]
    if get_origin(kind) is dict and isinstance(value, dict):
        return value
    if kind is Path and isinstance(value, str):
        return root / Path(value).expanduser()
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 takes 1e-4, without a point, for a text
        except (TypeError, ValueError):
            pass  # said below
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
    expected = words.get(kind, "a list" if get_origin(kind) is list else "a mapping")
    raise ValueError(f"{what} is {value!r}, but {expected} was expected")


def _is_required(entry: Any) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


def _near(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f": did you mean {' or '.join(close)}?" if close else f": there are {', '.join(known)}"
