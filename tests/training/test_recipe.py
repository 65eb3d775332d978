"""Recipes: reading, overriding, refusing; and the published rows."""

import pytest
import yaml

from vit_adapter.configuration.presets import PRESETS
from vit_adapter.training.recipe import Recipe, load_recipe

LEAST = {
    "preset": "tiny",
    "train_annotations": "a/train.json",
    "train_images": "a/train",
    "augmentation": [{"flip": {"probability": 0.5}}],
}


@pytest.fixture
def write(tmp_path):
    def write_recipe(name="own.yaml", **settings):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(settings))
        return path

    return write_recipe


def test_paths_count_from_the_recipes_folder_and_overrides_from_here(tmp_path, write):
    recipe = load_recipe(write(**LEAST), ["--train_images", "elsewhere"])
    assert recipe.train_annotations == tmp_path / "a" / "train.json"
    assert recipe.train_images.as_posix() == "elsewhere"
    assert recipe.name == "own"


def test_overrides_are_read_as_yaml(write):
    recipe = load_recipe(
        write(**LEAST),
        ["--learning_rate", "1e-4", "--lr-decay-epochs=[2, 3]", "--layer_decay_rate", "null", "--overwrite", "true"],
    )
    assert recipe.learning_rate == 1e-4
    assert recipe.lr_decay_epochs == [2, 3]
    assert recipe.layer_decay_rate is None
    assert recipe.overwrite is True


def test_a_recipe_may_extend_another(write, tmp_path):
    (tmp_path / "deeper").mkdir()
    write(**LEAST, num_epochs=5, seed=1)
    recipe = load_recipe(write("deeper/other.yaml", extends="../own.yaml", seed=2))
    assert (recipe.num_epochs, recipe.seed, recipe.name) == (5, 2, "other")
    assert recipe.train_images == tmp_path / "deeper" / ".." / "a" / "train"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["--learning-rat", "1"], "there is no setting 'learning_rat': did you mean learning_rate"),
        (["--learning_rate", "fast"], "learning_rate is 'fast', but a number was expected"),
        (["--num_epochs", "1.5"], "num_epochs is 1.5, but a whole number was expected"),
        (["--num_epochs", "true"], "num_epochs is True, but a whole number was expected"),
        (["--overwrite", "1"], "overwrite is 1, but true or false was expected"),
        (["--lr_decay_epochs", "3"], "lr_decay_epochs is 3, but a list was expected"),
        (["--lr_decay_epochs", "[a]"], "lr_decay_epochs is 'a', but a whole number was expected"),
        (["--num_epochs"], "--num_epochs needs a value"),
        (["num_epochs", "3"], "a setting is written --name value"),
        (["--num_epochs", "[3"], "--num_epochs cannot be read"),
        (["--preset", "dinov2-smal"], "there is no preset 'dinov2-smal': did you mean dinov2-small"),
        (["--preset", "null"], "names either a preset or a model"),
        (["--batch_size", "0"], "batch_size is 0, but at least 1 was expected"),
        (["--batch_size", "3"], "total_batch_size 16 is no multiple of batch_size 3"),
        (["--mixed_precision", "int8"], "mixed_precision is 'int8'"),
        (["--val_images", "x"], "val_annotations and val_images belong together"),
        (["--augmentation", "[{spin: {}}]"], "knows the steps flip, resize"),
        (["--checkpoint_every_steps", "0"], "checkpoint_every_steps is 0, but at least 1"),
    ],
)
def test_a_wrong_setting_is_named_in_a_sentence(write, overrides, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        load_recipe(write(**LEAST), overrides)
    assert "\n" not in str(error.value)


def test_a_wrong_file_is_named_in_a_sentence(write, tmp_path):
    with pytest.raises(ValueError, match=r"no\.yaml: there is no such recipe"):
        load_recipe(tmp_path / "no.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match=r"list\.yaml: a recipe consists of lines"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    with pytest.raises(ValueError, match=r"broken\.yaml: not YAML"):
        load_recipe(tmp_path / "broken.yaml")
    with pytest.raises(ValueError, match=r"own\.yaml: the recipe does not say train_annotations, train_images"):
        load_recipe(write(preset="tiny"))
    with pytest.raises(ValueError, match=r"own\.yaml: the recipe extends itself"):
        load_recipe(write(extends="own.yaml"))


def test_every_setting_is_described():
    described = Recipe.__doc__ or ""
    names = [name for name in Recipe.__dataclass_fields__ if name != "name"]
    assert [name for name in names if name not in described] == []


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_has_its_recipe(request, preset):
    recipes = [load_recipe(path) for path in request.config.rootpath.glob("training/recipes/*.yaml")]
    (recipe,) = [recipe for recipe in recipes if recipe.preset == preset and recipe.name != "own_data"]
    numbers = PRESETS[preset].training
    for name in ("learning_rate", "weight_decay", "layer_decay_rate", "num_epochs"):
        assert getattr(recipe, name) == numbers[name], name
    assert tuple(recipe.lr_decay_epochs) == numbers["lr_decay_epochs"]
    if preset == "tiny":
        assert recipe.name == "sample"
        return
    assert (recipe.image_mean, recipe.image_std) == tuple(
        None if name not in numbers else list(numbers[name]) for name in ("image_mean", "image_std")
    )
    assert (recipe.total_batch_size, recipe.warmup_steps, recipe.warmup_ratio) == (16, 500, 0.001)
    assert (recipe.gradient_clip_norm, recipe.mixed_precision, recipe.reference_quirks) == (None, None, True)
    assert recipe.backbone_weights.name == PRESETS[preset].source
    steps = [name for step in recipe.augmentation for name in step]
    assert (
        steps
        == {"multi_scale_crop": ["flip", "one_of", "crop"], "resize_flip": ["resize", "flip"]}[numbers["augmentation"]]
    )
    text = next(request.config.rootpath.glob(f"training/recipes/{recipe.name}.yaml")).read_text()
    published = (PRESETS[preset].box_ap, PRESETS[preset].mask_ap)
    assert "Nothing is published" in text if None in published else all(str(number) in text for number in published)
