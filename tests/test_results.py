"""The Pareto front against its definition, and what a candidate can be asked."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress_search.checkpoint import save_weights
from compress_search.exceptions import ModelError, PlanError, StudyError, WorkspaceError
from compress_search.plan import CompressionPlan, KeepChannels, PlanStep, apply_plan
from compress_search.results import (
    Candidate,
    ParetoFront,
    Reference,
    StageResult,
    format_candidates,
    pareto_optimal,
)
from compress_search.stage_files import seal

REFERENCE = Reference(accuracy=0.9, macs=1000, params=100)


def candidate(number, accuracy, mac_ratio, *, feasible=True, **changes):
    return Candidate(
        number=number,
        state="complete",
        params={"c_ssvd": 0.75, "c_cp": mac_ratio / 0.75},
        accuracy=accuracy,
        mac_ratio=mac_ratio,
        drop=REFERENCE.accuracy - accuracy,
        feasible=feasible,
        **changes,
    )


def test_a_table_writes_settings_of_any_type_after_the_ratios():
    params = {"selection": "uniform", "c_ssvd": 0.75, "fine_tune.epochs": 12345, "c_cp": 2 / 3}
    table = format_candidates(
        [candidate(0, 0.9, 0.5), dataclasses.replace(candidate(1, 0.9, 0.5), params=params)]
    )
    header, _, plain, mixed = (line.split() for line in table.splitlines())
    assert header[:5] == ["trial", "c_ssvd", "c_cp", "fine_tune.epochs", "selection"]
    assert mixed[:5] == ["1", "0.75", "0.6667", "12345", "uniform"]
    assert plain[:3] == ["0", "0.75", "0.6667"] and len(plain) == len(mixed) - 2


def front(*candidates):
    return ParetoFront(candidates, REFERENCE, target=0.5, tolerance=0.02)


# Few distinct values, so that ties are common.
candidates_lists = st.lists(
    st.tuples(st.integers(80, 86), st.integers(48, 54), st.booleans()), max_size=14
).map(lambda rows: [candidate(i, a / 100, m / 100, feasible=f) for i, (a, m, f) in enumerate(rows)])


def is_beaten(one, others):
    """The definition: at least as good in both, and better in one; of equals, the first."""
    for other in others:
        at_least = other.accuracy >= one.accuracy and other.mac_ratio <= one.mac_ratio
        equal = other.accuracy == one.accuracy and other.mac_ratio == one.mac_ratio
        if at_least and (not equal or other.number < one.number):
            return True
    return False


@given(candidates_lists)
def test_the_front_is_its_definition(candidates):
    feasible = [c for c in candidates if c.feasible]
    expected = sorted((c for c in feasible if not is_beaten(c, feasible)), key=lambda c: c.mac_ratio)
    found = front(*candidates)
    assert list(found) == list(found.best) == expected
    assert len(found) == len(expected)
    assert pareto_optimal(list(reversed(feasible))) == found.best


# In thousandths, so that the definition is reckoned in whole numbers: 0.9 - 0.83 is 0.07000000000000006
# as a float, and still a drop of 0.07.
@given(candidates_lists, st.none() | st.integers(30, 110))
def test_the_choice_is_its_definition(candidates, thousandths):
    def dropped(candidate):
        return round(1000 * REFERENCE.accuracy) - round(1000 * candidate.accuracy)

    max_drop = None if thousandths is None else thousandths / 1000
    feasible = [c for c in candidates if c.feasible]
    good = feasible if thousandths is None else [c for c in feasible if dropped(c) <= thousandths]
    if not good:
        with pytest.raises(StudyError):
            front(*candidates).choose(max_drop=max_drop)
        return
    chosen = front(*candidates).choose(max_drop=max_drop)
    assert chosen in good
    if max_drop is None:
        assert chosen.accuracy == max(c.accuracy for c in good)
    else:
        assert chosen.mac_ratio == min(c.mac_ratio for c in good)


def test_no_feasible_candidate_names_the_band():
    with pytest.raises(StudyError, match=r"mac_ratio in \[0\.4900, 0\.5100\]"):
        front(candidate(0, 0.9, 0.6, feasible=False)).choose()


def failed(number, reason):
    return Candidate(number=number, state="failed", params={}, reason=reason)


def test_where_all_trials_failed_the_reason_is_told_and_not_the_tolerance():
    faults = [failed(n, f"OSError: no file {n}.") for n in range(3)]
    with pytest.raises(
        StudyError, match=r"^The study has no candidate: all of its 3 trials failed, with: OSE"
    ):
        front(*faults).choose()
    with pytest.raises(
        StudyError, match=r"its only trial failed, with: OSError: no file 0\. Put that right, and"
    ):
        front(faults[0]).choose()
    with pytest.raises(StudyError, match=r"all of its 4 trials failed, 3 of them with: OSError: no file 0\."):
        front(failed(9, "ValueError"), *faults).choose()
    with pytest.raises(StudyError, match="widen the tolerance"):
        front(*faults, candidate(4, 0.9, 0.6, feasible=False)).choose()


def test_where_all_trials_gave_up_the_reason_is_told_and_not_the_tolerance():
    faults = [Candidate(number=n, state="pruned", params={}, reason="0.1 is out of reach") for n in range(2)]
    with pytest.raises(StudyError, match=r"all of its 2 trials gave up, with: 0\.1 is out of reach\. Put"):
        front(*faults).choose()
    with pytest.raises(StudyError, match=r"all of its 3 trials failed or gave up, 2 of them with: 0\.1 is"):
        front(*faults, failed(2, "ValueError")).choose()


def test_where_no_trial_has_ended_that_is_said():
    waiting = Candidate(number=0, state="waiting", params={})
    with pytest.raises(StudyError, match="No trial has ended"):
        front(waiting).choose()


def test_too_strict_a_drop_names_the_nearest():
    with pytest.raises(StudyError, match=r"at most 0\.01; the nearest is trial 1 with 0\.0500"):
        front(candidate(0, 0.8, 0.49), candidate(1, 0.85, 0.5)).choose(max_drop=0.01)


def test_candidates_that_did_not_complete_are_not_on_the_front():
    pruned = Candidate(number=0, state="pruned", params={"c_ssvd": 0.5}, reason="lost too much")
    assert list(front(pruned, candidate(1, 0.85, 0.5))) == [candidate(1, 0.85, 0.5)]


def test_a_stage_result_survives_json_unchanged():
    result = StageResult("abc", "fine_tune", 0.9, 500, 50, 0.5, 1.25, reused=True)
    assert StageResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_candidates_are_formatted_as_a_table():
    rows = format_candidates([candidate(3, 0.885, 0.495, seconds=12.34), candidate(10, 0.91, 0.5)])
    assert rows.splitlines() == [
        "trial  c_ssvd    c_cp  mac_ratio  accuracy %  drop %  seconds",
        "-------------------------------------------------------------",
        "    3    0.75    0.66     0.4950       88.50   +1.50     12.3",
        "   10    0.75  0.6667     0.5000       91.00   -1.00      0.0",
    ]
    dominated = candidate(4, 0.8, 0.5)
    assert str(front(candidate(3, 0.885, 0.495), dominated)) == format_candidates(
        [candidate(3, 0.885, 0.495)]
    )


PLAN = CompressionPlan(
    (
        PlanStep(
            "channel_pruning",
            0.5,
            (
                KeepChannels("0", outputs=(1, 2)),
                KeepChannels("1", outputs=(1, 2)),
                KeepChannels("3", inputs=(1, 2)),
            ),
        ),
    )
)


def test_a_candidate_prints_as_a_line():
    assert str(candidate(3, 0.885, 0.495)) == (
        "trial 3 (c_ssvd 0.75, c_cp 0.66), accuracy 88.50 %, drop +1.50 points, mac_ratio 0.4950"
    )
    # Where the metric is no share, nor is what is printed.
    other = dataclasses.replace(candidate(3, 30.5, 0.495), drop=-0.25)
    assert str(other).endswith("accuracy 30.50, drop -0.25, mac_ratio 0.4950")


def test_a_candidate_without_a_model_says_why():
    failed = Candidate(number=4, state="failed", params={"c_ssvd": 0.5}, reason="the loss is NaN")
    assert str(failed) == "trial 4 (c_ssvd 0.5), failed: the loss is NaN"
    assert (
        str(Candidate(number=5, state="running", params={"c_ssvd": 0.5})) == "trial 5 (c_ssvd 0.5), running"
    )


def test_a_candidate_rebuilds_its_model(tiny_net, tmp_path):
    trained = apply_plan(tiny_net(), PLAN)
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter)
    PLAN.save(tmp_path / "plan.json")
    save_weights(trained, tmp_path / "weights.safetensors")
    inputs = torch.randn(2, 1, 6, 6)

    found = candidate(0, 0.9, 0.5, folder=tmp_path, build_model=tiny_net)
    model = found.load_model()
    assert found.plan == PLAN
    assert not model.training
    assert torch.equal(model(inputs), trained.eval()(inputs))
    assert torch.equal(candidate(0, 0.9, 0.5, folder=tmp_path).load_model(tiny_net())(inputs), model(inputs))


def test_a_candidate_of_a_study_without_task_asks_for_the_original(tmp_path):
    with pytest.raises(StudyError, match=r"load_model\(original=\.\.\.\)"):
        candidate(0, 0.9, 0.5, folder=tmp_path).load_model()


def test_a_candidate_that_did_not_complete_has_no_model():
    pruned = Candidate(number=4, state="pruned", params={})
    for ask in (lambda: pruned.plan, lambda: pruned.weights):
        with pytest.raises(StudyError, match="Trial 4 is pruned, so it left no model"):
            ask()


def test_a_lost_plan_is_named(tmp_path, tiny_net):
    with pytest.raises(PlanError, match=r"plan\.json"):
        candidate(0, 0.9, 0.5, folder=tmp_path, build_model=tiny_net).load_model()


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        ("gone", WorkspaceError, r"weights\.safetensors' cannot be read"),
        ("cut off", WorkspaceError, r"weights\.safetensors' cannot be read"),
        ("of another model", ModelError, "do not fit Sequential: size mismatch"),
    ],
)
def test_weights_that_do_not_give_the_model_again_are_named_with_the_remedy(
    fault, error, says, tiny_net, tmp_path
):
    PLAN.save(tmp_path / "plan.json")
    save_weights(
        tiny_net() if fault == "of another model" else apply_plan(tiny_net(), PLAN),
        weights := tmp_path / "weights.safetensors",
    )
    if fault == "gone":
        weights.unlink()
    elif fault == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(error, match=f"{says}.*Run the same study under another name"):
        candidate(0, 0.9, 0.5, folder=tmp_path, build_model=tiny_net).load_model()


@pytest.mark.parametrize(
    ("file", "error"), [("weights.safetensors", WorkspaceError), ("plan.json", PlanError)]
)
def test_a_stored_candidate_with_one_flipped_bit_is_refused(file, error, tiny_net, tmp_path):
    PLAN.save(tmp_path / "plan.json")
    save_weights(apply_plan(tiny_net(), PLAN), tmp_path / "weights.safetensors")
    seal(tmp_path, {})
    found = candidate(0, 0.9, 0.5, folder=tmp_path, build_model=tiny_net)
    found.load_model()
    content = bytearray((tmp_path / file).read_bytes())
    content[-10] ^= 1
    (tmp_path / file).write_bytes(content)
    with pytest.raises(error, match=f"of trial 0, .* is damaged: {file} does not have the checksum"):
        found.load_model()


def test_a_notebook_shows_the_front_and_a_candidates_stages():
    page = front(candidate(0, 0.875, 0.5), candidate(1, 0.5, 0.505))._repr_html_()
    assert "The front of 2 trials; the original has 90.00 %" in page
    assert page.count("<tr>") == 2 and ">87.50<" in page
    stages = (
        StageResult("a", "spatial_svd", 0.8, 750, 80, 0.75, 1.5, True),
        StageResult("b", "fine_tune", 0.85, 750, 80, 0.75, 2.5, False),
    )
    page = candidate(3, 0.85, 0.5, stages=stages, reason="<why>")._repr_html_()
    assert "Trial 3 (c_ssvd 0.75, c_cp 0.6667) is complete: &lt;why&gt;" in page
    assert page.count("<tr>") == 3 and ">80.00<" in page and page.count(">yes<") == 1
