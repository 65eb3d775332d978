"""From pictures and COCO annotations to the detector's input, and from its detections back to the pictures.

Shape letters: B pictures in a batch, N objects or kept detections of one, M side of a mask (28); H, W the padded
input, h, w one picture. The input frame is pixels of the padded input; padding lies right and below, so that a
resized picture has the same frame.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .image_reading import load_image, to_bytes, to_rgb
from .masks import are_finite_numbers, decode_segmentation, paste_mask, paste_mask_as_rle, paste_region, resize_mask
from .resampling import resize_bilinear, resized_size


class MaskRcnnImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    antialias (`bool`, *optional*, defaults to `False`):
        Whether pictures are smoothed before they are made smaller. The published detectors are not used so.
    pad_size_divisor (`int`, *optional*, defaults to 32):
        Height and width of the padded batch are multiples of this number.
    """

    antialias: bool | None
    pad_size_divisor: int | None


class KeptDetections(NamedTuple):
    """What was kept of one picture's detections, best first, in the frame of the target."""

    boxes: torch.Tensor  # (N, 4) float32 xyxy in pixels
    scores: torch.Tensor  # (N,) float32
    labels: torch.Tensor  # (N,) int64
    masks: torch.Tensor  # (N, M, M) float32 probabilities inside the box
    height: int
    width: int


class MaskRcnnImageProcessor(TorchvisionBackend):
    """Resizes, normalises and pads pictures; prepares COCO annotations; brings detections back to the pictures.

    The defaults are the published detectors': short side 800 with at most 1333 for the long one, bilinear without
    antialiasing bit for bit as OpenCV, ImageNet mean and std, zeros to the right and below up to multiples of 32.
    Pictures are file names, PIL images, arrays or tensors; all become upright RGB of 8 bits (`image_reading`).
    """

    valid_kwargs = MaskRcnnImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]

    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 800, "longest_edge": 1333}
    default_to_square = False
    resample = PILImageResampling.BILINEAR
    antialias = False
    do_rescale = True
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_pad = True
    pad_size_divisor = 32

    def preprocess(
        self,
        images: ImageInput,
        annotations: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Unpack[MaskRcnnImageProcessorKwargs],
    ) -> BatchFeature:
        """The detector's input for one picture or a list of them; calling the processor does the same.

        Args:
            images: File names, PIL images, arrays or tensors. Those are taken as RGB; where they are not 8 bits, their
                range is brought to 0..255 (`image_reading.to_bytes`), unless `do_rescale` is False.
            annotations: One a picture, in transformers' form of COCO: `{"image_id": …, "annotations": […]}`, each
                annotation with `bbox` (x, y, width, height in pixels of the upright picture), `category_id`, and if
                masks are wanted `segmentation` (polygons or run lengths); `area`, `iscrowd` and `ignore` are obeyed
                where given. As in transformers' processors, `category_id` is the model's class index, counted from 0.

        Returns:
            pixel_values: (B, 3, H, W) float32.
            pixel_mask: (B, H, W) int64, 1 where the picture is; only if `do_pad`.
            labels: only with annotations: a list of one dict a picture, as the model takes them: boxes (N, 4) float32
                xyxy in the input frame, clipped to the picture, class_labels (N,) int64, masks (N, h, w) bool if
                there are segmentations, ignored_boxes (crowds, 4). Left out, as in the reference, are annotations of
                no area, of a side below one pixel, wholly outside the picture, or marked `ignore`; and objects of
                which clipping and rounding leave nothing.

        Raises:
            ValueError: a picture cannot be read, or an annotation is not of this form.
        """
        return super().preprocess(images, annotations, **kwargs)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """File names and addresses replaced by their pictures; a grey array (h, w) becomes (1, h, w)."""
        image = image_url_or_urls
        if isinstance(image, (list, tuple)):
            return [self.fetch_images(entry) for entry in image]
        if isinstance(image, str) and image.startswith(("http://", "https://", "data:image/")):
            return super().fetch_images(image)
        if isinstance(image, (str, os.PathLike)):
            return load_image(image)
        if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 2:
            return image[None]
        return super().fetch_images(image)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: torch.device | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One picture as an upright tensor (3, h, w), uint8 unless it is an array that shall not be rescaled."""
        do_rescale = kwargs.get("do_rescale")
        if isinstance(image, Image.Image):
            image = to_rgb(image) if do_convert_rgb else image
        elif do_rescale and isinstance(image, np.ndarray):
            image = to_bytes(image)
        elif do_rescale and isinstance(image, torch.Tensor) and image.dtype != torch.uint8:
            values = image.double() if image.is_floating_point() else image  # NumPy has no bfloat16
            image = torch.from_numpy(to_bytes(values.numpy(force=True))).to(image.device)
        return super().process_image(image, do_convert_rgb, input_data_format, device, **kwargs)

    def resize(
        self,
        image: torch.Tensor,
        size: SizeDict,
        resample: Any = None,
        antialias: bool | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """A picture (..., h, w) at the size asked for; edges and 8-bit bilinear values round as in the reference."""
        antialias = self.antialias if antialias is None else antialias
        if size.shortest_edge or size.longest_edge:
            height, width = resized_size(image.shape[-2], image.shape[-1], size.shortest_edge, size.longest_edge)
            size = SizeDict(height=height, width=width)
        as_opencv = image.dtype == torch.uint8 and resample == PILImageResampling.BILINEAR and not antialias
        if as_opencv and size.height and size.width:
            return resize_bilinear(image, size.height, size.width)
        return super().resize(image, size, resample=resample, antialias=antialias, **kwargs)

    def _preprocess(  # type: ignore[override]  # the annotations come second, as in transformers' detectors
        self,
        images: list[torch.Tensor],
        annotations: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        antialias: bool,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        do_pad: bool,
        pad_size: SizeDict | None,
        pad_size_divisor: int,
        return_tensors: Any,
        **kwargs: Any,
    ) -> BatchFeature:
        if not images:
            raise ValueError("at least one picture is needed, but got none")
        original_sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        if do_resize:
            images = [self.resize(image, size, resample=resample, antialias=antialias) for image in images]
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        images = [
            self.rescale_and_normalize(image, do_rescale, rescale_factor, do_normalize, image_mean, image_std)
            for image in images
        ]
        data: dict[str, Any] = {"pixel_values": images}
        if do_pad:
            pad_size = pad_size or _common_size(sizes, pad_size_divisor)
            padded, masks = self.pad(images, pad_size=pad_size, return_mask=True)
            data = {"pixel_values": torch.stack(list(padded)), "pixel_mask": torch.stack(list(masks))}
        features = BatchFeature(data, tensor_type=return_tensors)
        if annotations is not None:
            annotations = [annotations] if isinstance(annotations, Mapping) else list(annotations)
            if len(annotations) != len(images):
                raise ValueError(
                    f"every picture needs its annotations, but got {len(annotations)} for {len(images)} pictures"
                )
            features["labels"] = [
                {key: value.to(images[0].device) for key, value in prepare_labels(*arguments).items()}
                for arguments in zip(annotations, original_sizes, sizes, strict=True)
            ]
        return features

    def post_process_object_detection(
        self, outputs: Any, threshold: float = 0.5, target_sizes: Any = None
    ) -> list[dict[str, torch.Tensor]]:
        """The boxes that score above the threshold, best first.

        Args:
            outputs: The model's output, or anything with its pred_boxes, scores, pred_labels and image_sizes.
            target_sizes: (height, width) of every upright picture, as tuples or a tensor (B, 2). If None, boxes stay
                in the input frame.

        Returns:
            One dict a picture: scores (N,), labels (N,), boxes (N, 4) xyxy in pixels of the target.
        """
        return [
            {"scores": found.scores, "labels": found.labels, "boxes": found.boxes}
            for found in _detections(outputs, threshold, target_sizes, with_masks=False)
        ]

    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.5,
        target_sizes: Any = None,
        return_binary_maps: bool = False,
        return_coco_annotation: bool = False,
    ) -> list[dict[str, Any]]:
        """The instances that score above the threshold, best first.

        A map of ids shows only the best instance at each pixel. An instance of which better ones leave no more than
        the share `overlap_mask_area_threshold` visible is left out of it, as is one without pixels. The other two
        forms keep every instance whole.

        Args:
            outputs: The model's output, or anything with its fields.
            mask_threshold: A pixel belongs to an instance from this probability on.
            target_sizes: (height, width) of every upright picture. If None, its size within the input.
            return_binary_maps: Whether the segmentation is one mask an instance.
            return_coco_annotation: Whether it is one COCO run-length dict an instance.

        Returns:
            One dict a picture: segmentation, an (h, w) int32 map of ids with -1 for the background, or (N, h, w) bool,
            or a list of N dicts; and segments_info, N dicts of id (0 to N - 1, in order), label_id, score.
        """
        if return_binary_maps and return_coco_annotation:
            raise ValueError("return_binary_maps and return_coco_annotation exclude each other, but both are True")
        results = []
        for found in _detections(outputs, threshold, target_sizes):
            kept: Sequence[int] = range(len(found.scores))
            segmentation: Any
            if return_coco_annotation:
                segmentation = [paste_mask_as_rle(*arguments) for arguments in _pasting(found, mask_threshold)]
            elif return_binary_maps:
                segmentation = torch.zeros((len(kept), found.height, found.width), dtype=torch.bool)
                for index, arguments in enumerate(_pasting(found, mask_threshold)):
                    segmentation[index] = torch.from_numpy(paste_mask(*arguments))
            else:
                segmentation, kept = _id_map(found, mask_threshold, overlap_mask_area_threshold)
            segments = [
                {"id": number, "label_id": found.labels[index].item(), "score": found.scores[index].item()}
                for number, index in enumerate(kept)
            ]
            results.append({"segmentation": segmentation, "segments_info": segments})
        return results

    def post_process_coco(
        self,
        outputs: Any,
        target_sizes: Any = None,
        *,
        threshold: float = 0.0,
        mask_threshold: float = 0.5,
        category_ids: Sequence[int] | Mapping[int, int] | None = None,
        image_ids: Sequence[Any] | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Detections as COCO results, which pycocotools loads: what the published AP is computed from.

        Args:
            outputs: The model's output, or anything with its fields.
            target_sizes: (height, width) of every upright picture. If None, its size within the input.
            threshold: Scores must be above it; by default all that the model returns are kept.
            category_ids: The data set's id of each class index. If None, `category_id` is the class index.
            image_ids: One a picture. If None, results have no `image_id`.

        Returns:
            One list a picture, best score first, of dicts: category_id, bbox (x, y, width, height), score,
            segmentation (run lengths with `counts` a string), and image_id if given.
        """
        results = []
        for number, found in enumerate(_detections(outputs, threshold, target_sizes)):
            image_id = {} if image_ids is None else {"image_id": image_ids[number]}
            boxes = torch.cat([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], dim=1).tolist()
            scores, labels = found.scores.tolist(), found.labels.tolist()
            segmentations = (paste_mask_as_rle(*arguments) for arguments in _pasting(found, mask_threshold))
            results.append(
                [
                    {
                        **image_id,
                        "category_id": label if category_ids is None else category_ids[label],
                        "bbox": box,
                        "score": score,
                        "segmentation": segmentation,
                    }
                    for box, score, label, segmentation in zip(boxes, scores, labels, segmentations, strict=True)
                ]
            )
        return results


def prepare_labels(
    annotation: Mapping[str, Any], original_size: tuple[int, int], size: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """One picture's COCO annotations as the model's labels; see `MaskRcnnImageProcessor.preprocess`.

    Args:
        annotation: `{"annotations": [...]}` in pixels of the picture at its original size.
        original_size: (height, width) before resizing, which masks are rasterised at, as in the reference.
        size: (height, width) after it.

    Raises:
        ValueError: an annotation misses a key, its box is not four finite numbers, or its segmentation unreadable.
    """
    height, width = original_size
    if not isinstance(annotation, Mapping) or "annotations" not in annotation:
        raise ValueError(
            "annotations must be dicts with the key 'annotations', as in transformers' coco_detection form"
        )
    kept = [entry for entry in annotation["annotations"] if _is_usable(entry, height, width)]
    objects = [entry for entry in kept if not entry.get("iscrowd", 0)]
    crowds = [entry for entry in kept if entry.get("iscrowd", 0)]
    boxes = _resized_boxes(objects, original_size, size)
    # A sliver within the picture can round to nothing once it is clipped.
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    objects = list(itertools.compress(objects, has_area.tolist()))
    labels = {
        "boxes": boxes[has_area],
        "class_labels": torch.tensor([entry["category_id"] for entry in objects], dtype=torch.int64),
        "ignored_boxes": _resized_boxes(crowds, original_size, size),
    }
    if all("segmentation" in entry for entry in objects):
        masks = np.zeros((len(objects), *size), dtype=bool)
        for mask, entry in zip(masks, objects, strict=True):
            try:
                mask[:] = resize_mask(decode_segmentation(entry["segmentation"], height, width), *size)
            except ValueError as error:
                raise ValueError(f"{_name(entry)}: {error}") from error
        labels["masks"] = torch.from_numpy(masks)
    elif any("segmentation" in entry for entry in objects):
        missing = next(entry for entry in objects if "segmentation" not in entry)
        raise ValueError(f"{_name(missing)} has no segmentation, but others of its picture have one")
    return labels


def _is_usable(entry: Mapping[str, Any], height: int, width: int) -> bool:
    """Whether the reference's data set keeps the annotation. Raises a ValueError for one that cannot be read."""
    for key in ("bbox", "category_id"):
        if key not in entry:
            raise ValueError(f"{_name(entry)} has no {key}")
    box = entry["bbox"]
    if not are_finite_numbers(box) or len(box) != 4:
        raise ValueError(f"{_name(entry)}: bbox must be four finite numbers (x, y, width, height), but got {box}")
    if not isinstance(entry["category_id"], Integral):
        raise ValueError(f"{_name(entry)}: category_id must be the index of a class, but got {entry['category_id']!r}")
    left, top, box_width, box_height = box
    inside = left < width and top < height and left + box_width > 0 and top + box_height > 0
    large_enough = box_width >= 1 and box_height >= 1 and entry.get("area", 1) > 0
    return inside and large_enough and not entry.get("ignore", False)


def _name(entry: Mapping[str, Any]) -> str:
    return f"annotation {entry['id']}" if "id" in entry else "an annotation"


def _resized_boxes(
    entries: Sequence[Mapping[str, Any]], original_size: tuple[int, int], size: tuple[int, int]
) -> torch.Tensor:
    """The boxes of annotations (N, 4) float32 xyxy in pixels of the resized picture, clipped to it."""
    boxes = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    height, width = size
    return torch.minimum((boxes * _scale_factor(original_size, size)).clamp(min=0), torch.tensor([width, height] * 2))


def _scale_factor(original_size: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """(4,) float32: the true ratio of the rounded sizes for x, y, x, y, as the reference multiplies and divides by."""
    return torch.tensor([size[1] / original_size[1], size[0] / original_size[0]] * 2, dtype=torch.float32)


def _common_size(sizes: Sequence[tuple[int, int]], divisor: int) -> SizeDict:
    """The smallest size with sides that are multiples of the divisor and hold every one of the sizes."""
    height, width = (-(-max(sides) // divisor) * divisor for sides in zip(*sizes, strict=True))
    return SizeDict(height=height, width=width)


def _detections(outputs: Any, threshold: float, target_sizes: Any, with_masks: bool = True) -> list[KeptDetections]:
    """The model's output picture by picture, on the CPU in float32: scores above the threshold, best first."""
    sizes = [(int(height), int(width)) for height, width in outputs.image_sizes]
    targets = sizes if target_sizes is None else [(int(height), int(width)) for height, width in target_sizes]
    if len(targets) != len(sizes):
        raise ValueError(f"every picture needs a target size, but got {len(targets)} for {len(sizes)} pictures")
    results = []
    for index, (size, target) in enumerate(zip(sizes, targets, strict=True)):
        scores = outputs.scores[index].detach().float().cpu()
        labels = outputs.pred_labels[index].cpu()
        order = scores.argsort(descending=True, stable=True)
        order = order[(scores[order] > threshold) & (labels[order] >= 0)]  # label -1 is padding
        boxes = outputs.pred_boxes[index].detach().float().cpu()[order]
        masks = torch.zeros((0, 0, 0))
        if with_masks:
            masks = outputs.pred_masks[index].detach().float().cpu()[order].sigmoid()
        results.append(
            KeptDetections(
                boxes=boxes / _scale_factor(target, size),
                scores=scores[order],
                labels=labels[order],
                masks=masks,
                height=target[0],
                width=target[1],
            )
        )
    return results


def _pasting(found: KeptDetections, threshold: float) -> list[tuple[np.ndarray, np.ndarray, int, int, float]]:
    """The arguments of `paste_mask` for every detection."""
    pairs = zip(found.masks.numpy(), found.boxes.numpy(), strict=True)
    return [(mask, box, found.height, found.width, threshold) for mask, box in pairs]


def _id_map(found: KeptDetections, mask_threshold: float, visible_share: float) -> tuple[torch.Tensor, list[int]]:
    """The instances painted behind one another, best in front: (h, w) int32, -1 background, and which are in it."""
    ids = np.full((found.height, found.width), -1, dtype=np.int32)
    kept: list[int] = []
    for index, arguments in enumerate(_pasting(found, mask_threshold)):
        left, top, right, bottom = paste_region(found.boxes[index].tolist(), found.height, found.width)
        mask = paste_mask(*arguments)[top:bottom, left:right]
        place = ids[top:bottom, left:right]
        visible = mask & (place < 0)
        if visible.sum() > visible_share * mask.sum():
            place[visible] = len(kept)
            kept.append(index)
    return torch.from_numpy(ids), kept
