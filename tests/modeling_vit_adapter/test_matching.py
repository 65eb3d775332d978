"""Matching and sampling: by hand and against the reference, exactly."""

import pytest
import torch

from vit_adapter.modeling_vit_adapter import matching
from vit_adapter.modeling_vit_adapter.matching import NEGATIVE, UNUSED, choose, match, sample

# Side by side along x: the overlap of two boxes of height 1 is that of two intervals.
OBJECTS = torch.tensor([[0.0, 0.0, 10.0, 1.0], [20.0, 0.0, 30.0, 1.0]])


def boxes(*intervals: tuple[float, float]) -> torch.Tensor:
    return torch.tensor([[left, 0.0, right, 1.0] for left, right in intervals])


def test_candidates_are_positive_unused_or_negative_by_their_overlap():
    candidates = boxes((0, 10), (0, 9), (0, 5), (0, 2), (50, 60), (20, 30))
    matched = match(OBJECTS, candidates, positive_iou=0.7, negative_iou=0.3, min_positive_iou=0.3)
    assert matched.tolist() == [0, 0, UNUSED, NEGATIVE, NEGATIVE, 1]


def test_every_object_takes_all_candidates_that_reach_its_best_overlap():
    candidates = boxes((0, 4), (6, 10), (1, 3))
    matched = match(OBJECTS, candidates, positive_iou=0.7, negative_iou=0.3, min_positive_iou=0.3)
    assert matched.tolist() == [0, 0, NEGATIVE]


def test_an_object_below_the_least_overlap_takes_nothing():
    matched = match(OBJECTS, boxes((0, 2)), positive_iou=0.7, negative_iou=0.3, min_positive_iou=0.3)
    assert matched.tolist() == [NEGATIVE]


def test_later_objects_win_even_over_a_better_match():
    objects = boxes((0, 10), (2, 12))
    matched = match(objects, boxes((0, 10)), positive_iou=0.5, negative_iou=0.5, min_positive_iou=0.5)
    assert matched.tolist() == [1]  # overlap 1 with the first, 8 / 12 with the second, whose best it is


def test_without_objects_everything_is_negative():
    matched = match(torch.zeros(0, 4), boxes((0, 1), (2, 3)), positive_iou=0.7, negative_iou=0.3, min_positive_iou=0.3)
    assert matched.tolist() == [NEGATIVE, NEGATIVE]


def test_without_candidates_nothing_is_matched():
    assert len(match(OBJECTS, torch.zeros(0, 4), positive_iou=0.7, negative_iou=0.3, min_positive_iou=0.3)) == 0


def test_matching_in_chunks_changes_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    corners = 40 * torch.rand(60, 2, generator=generator)
    candidates = torch.cat([corners, corners + 20], dim=1).round()  # whole numbers make ties
    settings = {"positive_iou": 0.5, "negative_iou": 0.3, "min_positive_iou": 0.3}
    expected = match(candidates[:9], candidates, **settings)
    monkeypatch.setattr(matching, "MAX_OVERLAPS", 2 * len(candidates))
    assert torch.equal(match(candidates[:9], candidates, **settings), expected)


@pytest.mark.parametrize("run", ["rpn", "roi", "rpn_empty_gt", "roi_empty_gt"])
def test_matching_equals_the_reference(run, reference_case):
    case = reference_case("assigner")
    facts = case.facts["runs"][run]
    settings = facts["settings"]
    objects = case.tensors["gt"][:0] if run.endswith("empty_gt") else case.tensors["gt"]
    matched = match(
        objects,
        case.tensors[facts["boxes"]],
        positive_iou=settings["pos_iou_thr"],
        negative_iou=settings["neg_iou_thr"],
        min_positive_iou=settings["min_pos_iou"],
    )
    # The reference: -1 neither, 0 negative, i + 1 positive for object i.
    expected = case.tensors[f"{run}.gt_inds"] - 1
    expected = torch.where(expected == -2, UNUSED, expected)
    assert torch.equal(matched, expected)


def test_negatives_fill_up_what_positives_leave():
    matched = torch.tensor([0, NEGATIVE, UNUSED, NEGATIVE, 1, NEGATIVE])
    positive, negative = sample(matched, batch_size=5, positive_fraction=0.5)
    assert positive.tolist() == [0, 4] and negative.tolist() == [1, 3, 5]


def test_a_sample_is_ascending_and_of_the_asked_size():
    torch.manual_seed(0)
    matched = torch.tensor([0] * 40 + [NEGATIVE] * 60)
    positive, negative = sample(matched, batch_size=20, positive_fraction=0.25)
    assert len(positive) == 5 and len(negative) == 15
    assert positive.tolist() == sorted(set(positive.tolist())) and positive.max() < 40
    assert negative.tolist() == sorted(set(negative.tolist())) and negative.min() >= 40


def test_choosing_is_repeatable_with_a_generator():
    candidates = torch.arange(100, 130)
    first, second = (choose(candidates, 7, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and len(set(first.tolist()) & set(candidates.tolist())) == 7
