from __future__ import annotations

from collections.abc import Callable

import pytest

from compress_search.reports.story import story_of
from compress_search.results import Candidate, ParetoFront, StageResult

Make = Callable[..., Candidate]
MakeFront = Callable[..., ParetoFront]


def _both(first: float, second: float, accuracies: tuple[float, ...]) -> tuple[StageResult, ...]:
    names = ("spatial_svd", "fine_tune", "channel_pruning", "fine_tune")
    ratios = (first, first, first * second, first * second)
    return tuple(
        StageResult(f"k{n}", name, accuracy, 1000, 100, ratio, 1.0)
        for n, (name, accuracy, ratio) in enumerate(zip(names, accuracies, ratios, strict=False))
    )


@pytest.fixture
def front(make_candidate: Make, make_front: MakeFront) -> ParetoFront:
    return make_front(
        make_candidate(0, 0.5, 0.96, stages=_both(0.8, 0.625, (0.90, 0.97, 0.85, 0.96))),
        make_candidate(1, 0.495, 0.95, stages=_both(0.75, 0.66, (0.88, 0.94, 0.80, 0.95))),
        make_candidate(2, 0.5, 0.9, state="pruned", stages=_both(0.55, 0.9, (0.5, 0.7))),
        make_candidate(3, 0.5, 0.97, stages=_both(0.8, 0.625, (0.90, 0.97, 0.85, 0.97)), finalist_of=0),
    )


def test_the_story_has_the_halves_the_gate_and_the_pick(front: ParetoFront) -> None:
    story = {c.title: c.text for c in story_of(front, chosen=front.candidates[1], allowed_drop=0.05)}
    assert list(story) == ["First half: spatial SVD", "Gate", "Second half: channel pruning", "Pick"]
    assert story["First half: spatial SVD"] == (
        "3 trials, 3 different ratios (c_ssvd, as achieved): 0.55 to 0.8. Accuracy right after it 50.00 % to "
        "90.00 %, after the fine-tuning that follows 70.00 % to 97.00 %; the original's is 98.00 %."
    )
    assert story["Second half: channel pruning"].startswith(
        "2 trials, 2 different ratios (c_cp, as achieved): 0.625 to 0.66. Accuracy right after it 80.00 % to"
    )
    assert story["Gate"] == (
        "A trial may have lost 5.00 points half-way (max_drop_after_ssvd). 2 trials went on, 1 trial gave up "
        "here."
    )
    assert "Trial 1 is picked: 0.7500 x 0.6600 = 0.4950 of the MACs, accuracy 95.00 %" in story["Pick"]
    assert "trial 3, has 97.00 % at 0.5000" in story["Pick"]


def test_a_finalist_says_whose_model_it_trained_on(front: ParetoFront) -> None:
    pick = story_of(front, chosen=front.candidates[3], allowed_drop=None)[-1].text
    assert "Trial 3, which trained trial 0 on, is picked" in pick


def test_without_a_gate_none_is_told(front: ParetoFront) -> None:
    gate = story_of(front, chosen=None, allowed_drop=None)[1]
    assert gate.text == "None was set (max_drop_after_ssvd), so no trial gave up here: 2 trials went on."


def test_what_was_given_up_in_the_last_fine_tuning_has_passed_the_gate(
    make_candidate: Make, make_front: MakeFront
) -> None:
    front = make_front(
        make_candidate(0, 0.5, 0.96, stages=_both(0.8, 0.625, (0.90, 0.97, 0.85, 0.96))),
        make_candidate(
            1,
            0.5,
            0.9,
            state="pruned",
            stages=_both(0.8, 0.625, (0.90, 0.97, 0.85)),
            learning_curve=(0.85, 0.9),
        ),
    )
    story = {c.title: c.text for c in story_of(front, chosen=front.candidates[0], allowed_drop=0.05)}
    assert story["Gate"].endswith("2 trials went on, none gave up here.")
    assert story["Given up in the last fine-tuning"] == (
        "1 trial ended before the last epoch: half of the others were ahead by then (median_stopping)."
    )
    assert list(story)[-1] == "Pick"


def test_only_what_the_gate_ended_gave_up_there(make_candidate: Make, make_front: MakeFront) -> None:
    """A trial without a second half never comes to it, and an unreachable second ratio is found after it."""
    pruning = StageResult("k", "channel_pruning", 0.8, 1000, 100, 0.5, 1.0)
    front = make_front(
        make_candidate(0, 0.5, 0.96, stages=_both(0.8, 0.625, (0.90, 0.97, 0.85, 0.96))),
        make_candidate(1, 0.5, 0.9, state="pruned", stages=(pruning,), learning_curve=(0.8, 0.85)),
        make_candidate(2, 0.5, 0.9, state="pruned", stages=_both(0.8, 0.625, (0.90, 0.97))),
    )
    story = {c.title: c.text for c in story_of(front, chosen=None, allowed_drop=0.05)}
    assert story["Gate"].endswith("1 trial went on, none gave up here.")
    assert story["Given up in the last fine-tuning"].startswith("1 trial ended")


def test_one_method_has_no_halves(make_candidate: Make, make_front: MakeFront) -> None:
    one = make_front(make_candidate(0, 0.5, 0.97, stages=_both(0.5, 1.0, (0.9, 0.97))))
    assert [c.title for c in story_of(one, chosen=one.best[0], allowed_drop=0.1)] == ["spatial SVD", "Pick"]


def test_a_study_that_has_done_nothing_has_no_story(make_candidate: Make, make_front: MakeFront) -> None:
    assert story_of(make_front(), chosen=None, allowed_drop=0.1) == ()
    failed = make_front(make_candidate(0, 0.5, 0.9, state="failed", stages=()))
    assert story_of(failed, chosen=None, allowed_drop=0.1) == ()
