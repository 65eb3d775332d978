"""The whole detector: inference and training against the reference, laws, and bad input in clear words.

Tolerances are those that its README calls fair; the gradients of its float32 and float64 runs differ by up to 1.8e-3
where the batch norms are in eval mode.
"""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    ResNetConfig,
    SwinConfig,
    Trainer,
    TrainingArguments,
)

from vit_adapter import MaskRcnnConfig, MaskRcnnForInstanceSegmentation
from vit_adapter.conversion.detector import state_to_reference
from vit_adapter.modeling_vit_adapter import matching

LOSSES = ["loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"]
GRADIENT_ERROR = {"train": 1e-3, "eval": 5e-3}


def keep_first(candidates, count, generator=None):
    return candidates[:count]


def keep_evenly(candidates, count, generator=None):
    return candidates[torch.arange(count) * len(candidates) // count]


def masks_of_pictures(metas, height: int, width: int) -> torch.Tensor:
    """1 where each picture is."""
    pixel_mask = torch.zeros(len(metas), height, width, dtype=torch.long)
    for mask, meta in zip(pixel_mask, metas, strict=True):
        mask[: meta["img_shape"][0], : meta["img_shape"][1]] = 1
    return pixel_mask


def reference_labels(case) -> list[dict[str, torch.Tensor]]:
    return [
        {
            "boxes": case.tensors[f"gt_bboxes.{picture}"],
            "class_labels": case.tensors[f"gt_labels.{picture}"],
            "masks": case.tensors[f"gt_masks.{picture}"],
            "ignored_boxes": case.tensors[f"gt_bboxes_ignore.{picture}"],
        }
        for picture in range(3)
    ]


def labels_of(*counts: int) -> list[dict[str, torch.Tensor]]:
    """Labels of pictures of 64 x 96 pixels with so many objects each."""
    generator = torch.Generator().manual_seed(0)
    labels = []
    for count in counts:
        corners = torch.rand(count, 2, generator=generator) * torch.tensor([60.0, 30.0])
        boxes = torch.cat([corners, corners + torch.tensor([30.0, 28.0])], dim=1)
        masks = torch.zeros(count, 64, 96, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        labels.append({"boxes": boxes, "class_labels": torch.arange(count) % 3, "masks": masks})
    return labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_detections_equal_the_reference(dtype, reference_case, reference_detector):
    case = reference_case("detector_inference")
    model = reference_detector().to(dtype)
    pixel_values = case.pictures("u8", dtype)
    metas = case.facts["img_metas"]
    with torch.no_grad():
        output = model(pixel_values, masks_of_pictures(metas, *pixel_values.shape[-2:]))
    assert output.image_sizes.tolist() == [meta["img_shape"][:2] for meta in metas]
    for picture, meta in enumerate(metas):
        expected = case.tensors[f"det_bboxes.{picture}"].to(dtype)
        count = len(expected)
        assert output.pred_labels[picture, :count].tolist() == case.tensors[f"det_labels.{picture}"].tolist()
        assert output.pred_labels[picture, count:].eq(-1).all()
        # The stored boxes are those of the original picture.
        boxes = output.pred_boxes[picture, :count] / torch.tensor(meta["scale_factor"], dtype=dtype)
        torch.testing.assert_close(boxes, expected[:, :4], rtol=0, atol=2e-2)
        torch.testing.assert_close(output.scores[picture, :count], expected[:, 4], rtol=0, atol=1e-4)
        masks = case.tensors[f"mask_logits.{picture}"].to(dtype)
        torch.testing.assert_close(output.pred_masks[picture, :count], masks, rtol=0, atol=2e-3)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("rule", "choose"), [("first", keep_first), ("even", keep_evenly)])
def test_losses_and_gradients_equal_the_reference(rule, choose, mode, reference_case, reference_detector, monkeypatch):
    case = reference_case("detector_training")
    run, facts = f"{rule}.bn_{mode}", case.facts["runs"][f"{rule}.bn_{mode}"]
    monkeypatch.setattr(matching, "choose", choose)
    model = reference_detector().train()
    model.backbone.train(mode == "train")
    pixel_values = case.pictures("u8")
    pixel_mask = masks_of_pictures(case.facts["img_metas"], *pixel_values.shape[-2:])
    labels = reference_labels(case)

    samples = watch_samples(model, monkeypatch)
    output = model(pixel_values, pixel_mask, labels)
    for name in LOSSES:
        assert output.loss_dict[name].item() == pytest.approx(facts["log"][name], rel=1e-4), name
    assert output.loss.item() == pytest.approx(facts["total"], rel=1e-4)
    for picture in range(3):
        for name, indices in samples[picture].items():
            assert indices.tolist() == case.tensors[f"{run}.{name}.{picture}"].tolist(), (name, picture)

    output.loss.backward()
    expected = {
        key.removeprefix(f"{run}.grad."): value
        for key, value in case.tensors.items()
        if key.startswith(f"{run}.grad.")
    }  # fmt: skip
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    ours = state_to_reference(model.state_dict() | gradients, model.config)
    for name, gradient in expected.items():
        error = (ours[name] - gradient).norm()
        assert error <= GRADIENT_ERROR[mode] * gradient.norm(), (name, error.item())


def watch_samples(model, monkeypatch) -> list[dict[str, torch.Tensor]]:
    """Collects, for each picture, which anchors and regions enter the losses, by the reference's names."""
    samples: list[dict[str, torch.Tensor]] = []
    assign, sample_regions = model.rpn.assign, model.box_head.sample_regions
    pictures = iter(range(3))

    def watched_assign(anchors, objects):
        matched, (positive, negative) = assign(anchors, objects)
        samples.append({"rpn_pos_inds": positive, "rpn_neg_inds": negative, "rpn_pos_gt": matched[positive]})
        return matched, (positive, negative)

    def watched_sample_regions(proposals, objects):
        regions = sample_regions(proposals, objects)
        positives = len(regions.objects)
        samples[next(pictures)] |= {
            "roi_pos_inds": regions.indices[:positives],
            "roi_neg_inds": regions.indices[positives:],
            "roi_pos_gt": regions.objects,
        }
        return regions

    monkeypatch.setattr(model.rpn, "assign", watched_assign)
    monkeypatch.setattr(model.box_head, "sample_regions", watched_sample_regions)
    return samples


def test_losses_equal_the_reference_in_float64(reference_case, reference_detector, monkeypatch):
    case = reference_case("detector_training")
    monkeypatch.setattr(matching, "choose", keep_first)
    model = reference_detector().double().train()
    pixel_values = case.pictures("u8", torch.float64)
    pixel_mask = masks_of_pictures(case.facts["img_metas"], *pixel_values.shape[-2:])
    loss = model(pixel_values, pixel_mask, reference_labels(case)).loss
    # The reference's anchors, targets and normalisers stay in float32.
    assert loss.item() == pytest.approx(case.facts["runs"]["first.bn_train"]["total_float64"], rel=1e-6)


def test_the_sum_of_the_parts_is_the_loss_in_either_mode(small_detector):
    pixel_values, labels = torch.randn(2, 3, 64, 96), labels_of(2, 1)
    training = small_detector.train()(pixel_values, labels=labels)
    assert training.pred_boxes is None and training.loss.item() == pytest.approx(
        sum(part.item() for part in training.loss_dict.values())
    )
    evaluation = small_detector.eval()(pixel_values, labels=labels)
    assert evaluation.loss.isfinite() and evaluation.pred_boxes.shape == (2, 10, 4)


@pytest.mark.parametrize("counts", [(2, 0), (0, 0)])
def test_every_parameter_gets_a_gradient_without_objects(counts, small_detector):
    loss = small_detector.train()(torch.randn(2, 3, 64, 96), labels=labels_of(*counts)).loss
    loss.backward()
    assert loss.isfinite()
    without = [name for name, parameter in small_detector.named_parameters() if parameter.grad is None]
    assert without == []


def test_polygons_give_the_loss_of_their_bitmaps(small_detector, monkeypatch):
    from vit_adapter.modeling_vit_adapter.masks import decode_segmentation

    monkeypatch.setattr(matching, "choose", keep_first)
    polygons = [[[5.0, 6.0, 60.0, 10.0, 40.0, 55.0]], [[50.0, 20.0, 90.0, 20.0, 90.0, 60.0, 50.0, 60.0]]]
    label = {
        "boxes": torch.tensor([[5.0, 6.0, 60.0, 55.0], [50.0, 20.0, 90.0, 60.0]]),
        "class_labels": torch.tensor([0, 2]),
    }
    bitmaps = torch.stack([torch.from_numpy(decode_segmentation(polygon, 64, 96)) for polygon in polygons])
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        drawn = small_detector.eval()(pixel_values, labels=[{**label, "polygons": polygons}]).loss_dict["loss_mask"]
        given = small_detector(pixel_values, labels=[{**label, "masks": bitmaps}]).loss_dict["loss_mask"]
    assert drawn.item() == given.item() > 0


def test_a_bitmap_smaller_than_the_picture_is_zero_beyond(small_detector, monkeypatch):
    monkeypatch.setattr(matching, "choose", keep_first)
    (label,) = labels_of(2)
    label["masks"][:, 40:] = 0
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        whole = small_detector.eval()(pixel_values, labels=[label]).loss_dict["loss_mask"]
        cut = small_detector(pixel_values, labels=[{**label, "masks": label["masks"][:, :40]}]).loss_dict["loss_mask"]
    assert cut.item() == whole.item()


def test_ignored_boxes_have_no_effect(small_detector, monkeypatch):
    monkeypatch.setattr(matching, "choose", keep_first)
    (label,) = labels_of(2)
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        without = small_detector.eval()(pixel_values, labels=[label]).loss
        ignored = {**label, "ignored_boxes": torch.tensor([[0.0, 0.0, 90.0, 60.0]])}
        assert small_detector(pixel_values, labels=[ignored]).loss.item() == without.item()


def test_a_batch_of_equal_sizes_equals_its_pictures_one_by_one(small_detector):
    pictures = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        together = small_detector.eval()(pictures)
        alone = [small_detector(picture[None]) for picture in pictures]
    for name in ("pred_boxes", "scores", "pred_labels", "pred_masks"):
        expected = torch.cat([output[name] for output in alone])
        torch.testing.assert_close(together[name], expected, rtol=1e-4, atol=1e-3)


def test_detections_lie_within_their_picture(small_detector):
    pixel_mask = torch.zeros(2, 64, 96)
    pixel_mask[0, :50, :33] = pixel_mask[1] = 1
    output = small_detector.eval()(torch.randn(2, 3, 64, 96), pixel_mask)
    assert output.image_sizes.tolist() == [[50, 33], [64, 96]]
    assert output.pred_boxes[0, :, 0::2].max() <= 33 and output.pred_boxes[0, :, 1::2].max() <= 50


def test_saving_and_loading_changes_no_bit(small_detector, tmp_path):
    small_detector.save_pretrained(tmp_path)
    loaded = MaskRcnnForInstanceSegmentation.from_pretrained(tmp_path)
    state = small_detector.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = small_detector.eval()(pixel_values), loaded.eval()(pixel_values)
    assert torch.equal(expected.pred_boxes, found.pred_boxes) and torch.equal(expected.pred_masks, found.pred_masks)


def test_a_backbone_folder_starts_a_detector(small_detector, tmp_path):
    small_detector.backbone.save_pretrained(tmp_path)
    loaded, report = MaskRcnnForInstanceSegmentation.from_pretrained(
        tmp_path, config=small_detector.config, output_loading_info=True
    )
    assert all(name.startswith(("neck.", "rpn.", "box_head.", "mask_head.")) for name in report["missing_keys"])
    for name, tensor in small_detector.backbone.state_dict().items():
        assert torch.equal(loaded.backbone.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "auto",
    [AutoModel, AutoModelForInstanceSegmentation, AutoModelForObjectDetection, AutoModelForImageSegmentation],
)
def test_auto_classes_load_the_detector(auto, small_detector, tmp_path):
    small_detector.save_pretrained(tmp_path)
    assert type(auto.from_pretrained(tmp_path)) is MaskRcnnForInstanceSegmentation


@pytest.mark.parametrize(
    "backbone_config",
    [
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], out_indices=[1, 2, 3, 4]),
        SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=3, out_indices=[1, 2, 3, 4]),
    ],
    ids=["resnet", "swin"],
)
def test_any_transformers_backbone_with_four_levels_feeds_the_detector(backbone_config, small_detector_config):
    config = MaskRcnnConfig.from_dict(
        {**small_detector_config.to_dict(), "backbone_config": backbone_config.to_dict()}
    )
    model = MaskRcnnForInstanceSegmentation(config).train()
    model(torch.randn(2, 3, 64, 96), labels=labels_of(2, 1)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.neck.parameters())
    assert model.eval()(torch.randn(1, 3, 64, 96)).pred_masks.shape == (1, 10, 28, 28)


def test_maps_at_other_strides_get_one_clear_sentence(small_detector_config):
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], out_indices=[0, 1, 2, 3]
    )
    config = MaskRcnnConfig.from_dict({**small_detector_config.to_dict(), "backbone_config": backbone.to_dict()})
    with pytest.raises(ValueError, match="out_indices must name the maps at strides 4, 8, 16 and 32"):
        MaskRcnnForInstanceSegmentation(config)(torch.zeros(1, 3, 64, 96))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"class_labels": torch.tensor([0, 3])}, "run from 0 to 3, but the model has 3 classes"),
        ({"class_labels": torch.tensor([-1, 1])}, "run from -1 to 1, but the model has 3 classes"),
        ({"boxes": torch.zeros(3, 4)}, r"boxes \(3, 4\), 2 masks and 2 classes, but one of each"),
        ({"masks": torch.zeros(1, 64, 96)}, r"1 masks and 2 classes, but one of each"),
        ({"boxes": torch.tensor([[5.0, 6, 60, 55], [50, 20, 50, 60]])}, "picture 0 hold a box without area"),
        ({"boxes": torch.tensor([[5.0, 6, 60, 55], [90, 20, 50, 60]])}, "picture 0 hold a box without area"),
        ({"boxes": torch.tensor([[5.0, 6, 60, 55], [50, 20, torch.nan, 60]])}, "or one that is not finite"),
    ],
)
def test_labels_that_contradict_each_other_are_named(change, sentence, small_detector):
    with pytest.raises(ValueError, match=sentence):
        small_detector(torch.zeros(1, 3, 64, 96), labels=[{**labels_of(2)[0], **change}])


def test_a_picture_without_objects_needs_no_masks(small_detector):
    nothing = {"boxes": torch.zeros(0, 4), "class_labels": torch.zeros(0, dtype=torch.long)}
    assert small_detector.train()(torch.randn(1, 3, 64, 96), labels=[nothing]).loss.isfinite()


@pytest.mark.parametrize("missing", ["boxes", "class_labels", "masks"])
def test_labels_that_lack_a_part_are_named(missing, small_detector):
    (label,) = labels_of(2)
    del label[missing]
    with pytest.raises(ValueError, match=r"picture 0 hold .*, but boxes, class_labels, and where there are objects"):
        small_detector(torch.zeros(1, 3, 64, 96), labels=[label])


@pytest.mark.parametrize(
    ("count", "dtype"), [(2, torch.int32), (0, torch.float32)], ids=["int32", "empty list as a tensor"]
)
def test_class_labels_of_any_dtype_give_the_same_loss(count, dtype, small_detector, monkeypatch):
    monkeypatch.setattr(matching, "choose", keep_first)
    (label,) = labels_of(count)
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = small_detector.eval()(pixel_values, labels=[label]).loss
        changed = {**label, "class_labels": label["class_labels"].to(dtype)}
        assert small_detector(pixel_values, labels=[changed]).loss.item() == expected.item()


def test_labels_for_another_number_of_pictures_are_named(small_detector):
    with pytest.raises(ValueError, match="labels for 1 pictures, but pixel_values holds 2"):
        small_detector(torch.zeros(2, 3, 64, 96), labels=labels_of(1))


@pytest.mark.parametrize(
    ("pixel_mask", "sentence"),
    [
        (torch.ones(1, 32, 96), r"shape \(1, 32, 96\), but \(1, 64, 96\) was expected"),
        (torch.eye(96)[None, :64], "a rectangle from each picture's top-left corner"),
        (torch.zeros(1, 64, 96), "a rectangle from each picture's top-left corner"),
    ],
)
def test_a_pixel_mask_that_is_no_rectangle_is_named(pixel_mask, sentence, small_detector):
    with pytest.raises(ValueError, match=sentence):
        small_detector(torch.zeros(1, 3, 64, 96), pixel_mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_detector_in_half_precision_finds_and_learns(dtype, small_detector, tmp_path):
    small_detector.save_pretrained(tmp_path)
    model = MaskRcnnForInstanceSegmentation.from_pretrained(tmp_path, dtype=dtype).eval()
    pixel_values = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        output = model(pixel_values)
    assert output.scores.dtype == torch.float32 and output.pred_boxes.isfinite().all()
    loss = model.train()(pixel_values, labels=labels_of(2, 1)).loss
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_the_detector_changes_no_gradient(use_reentrant, small_detector, monkeypatch):
    monkeypatch.setattr(matching, "choose", keep_first)
    pixel_values = torch.randn(2, 3, 64, 96)

    def gradients() -> dict[str, torch.Tensor]:
        small_detector.zero_grad()
        small_detector.train()(pixel_values, labels=labels_of(2, 1)).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in small_detector.named_parameters()}

    expected = gradients()
    small_detector.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_the_configuration_may_ask_for_hidden_states_and_attentions(small_detector):
    small_detector.set_attn_implementation("eager")
    small_detector.config.output_hidden_states = small_detector.config.output_attentions = True
    output = small_detector.eval()(torch.randn(1, 3, 64, 96))
    assert len(output.hidden_states) == 5 and len(output.attentions) == 4
    assert small_detector(torch.randn(1, 3, 64, 96), output_hidden_states=False).hidden_states is None


def test_a_trainer_divides_the_loss_by_its_accumulation_steps(small_detector, tmp_path):
    trainer = Trainer(small_detector, TrainingArguments(tmp_path, report_to=[], use_cpu=True))
    assert not trainer.model_accepts_loss_kwargs


def test_another_number_of_classes_renews_what_depends_on_it(small_detector, tmp_path):
    small_detector.save_pretrained(tmp_path)
    loaded, report = MaskRcnnForInstanceSegmentation.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name.rsplit(".", 1)[0] for name, _, _ in report["mismatched_keys"]} == {
        "box_head.class_scores",
        "box_head.box_deltas",
        "mask_head.mask_logits",
    }
    assert loaded.box_head.class_scores.weight.shape == (6, 32) and len(loaded.config.id2label) == 5
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())
    assert torch.equal(loaded.box_head.fc1.weight, small_detector.box_head.fc1.weight)


def test_bfloat16_autocast_keeps_the_losses_in_float32(small_detector):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = small_detector.train()(torch.randn(1, 3, 64, 96), labels=labels_of(2))
    assert {part.dtype for part in output.loss_dict.values()} == {torch.float32} and output.loss.isfinite()
