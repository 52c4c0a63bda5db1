from __future__ import annotations

from optuna.trial import TrialState, create_trial

from compress_search.search.history import current_trials, finished_trials, proposal_indices

S = TrialState


def trials(*specs):
    made = []
    for number, (state, attrs) in enumerate(specs):
        trial = create_trial(
            state=state, values=[0.0, 0.0] if state == S.COMPLETE else None, user_attrs=attrs
        )
        trial.number = number
        made.append(trial)
    return made


# Trials 1 and 3 were interrupted; 4 is the retry of 1, 5 a needless second one, 6 the retry of 3, which was
# interrupted again, 7 is new, 8 the retry of 6.
HISTORY = trials(
    (S.COMPLETE, {}),
    (S.FAIL, {"interrupted": "died"}),
    (S.PRUNED, {}),
    (S.FAIL, {"interrupted": "died"}),
    (S.COMPLETE, {"retry_of": 1}),
    (S.FAIL, {"retry_of": 1, "duplicate_of": 4}),
    (S.FAIL, {"retry_of": 3, "interrupted": "stopped"}),
    (S.FAIL, {}),
    (S.WAITING, {"retry_of": 6}),
    (S.RUNNING, {}),
)


def test_only_the_last_trial_of_a_proposal_counts():
    assert [trial.number for trial in current_trials(HISTORY)] == [0, 2, 4, 7, 8, 9]
    assert [trial.number for trial in finished_trials(HISTORY)] == [0, 2, 4, 7]


def test_proposals_are_numbered_as_if_nothing_had_been_interrupted():
    assert list(proposal_indices(HISTORY).values()) == [0, 1, 2, 3, 1, 1, 3, 4, 3, 5]
