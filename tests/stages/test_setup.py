"""What a run trains, as trainer_state.json keeps it: read strictly, and found again for the data of a resumed run."""

from __future__ import annotations

import json

import pytest

from dylora_moe.stages.setup import Stage, Trained
from dylora_moe.store.files import FileProblem


def stage(*skills: str, first_step: int = 0, branch_step: int | None = None) -> Stage:
    return Stage(first_step, branch_step, [Trained(name, i) for i, name in enumerate(skills)])


def test_what_is_written_is_read_again():
    saved = Stage(2, 4, [Trained("a", 0), None, Trained("b", None)], parts={"x": "0101"})
    assert Stage.from_json(json.loads(json.dumps(saved.to_json())), 1, 2) == saved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_step": "0"}, "stage.first_step: expected a whole number, found '0'"),
        ({"first_step": -1}, "stage.first_step: expected a number from 0 to 4, found -1"),
        ({"first_step": 5}, "stage.first_step: expected a number from 0 to 4, found 5"),
        ({"branch_step": 0}, "stage.branch_step: expected more than 0, found 0"),
        ({"data": [{"skill": "a", "expert": 2}]}, "stage.data: expected experts from 0 to 1, found 2"),
        ({"data": [{"skill": 5, "expert": 0}]}, "skill: expected text, found 5"),
        ({"data": [{"skill": "a"}]}, "expert: expected a value, found none"),
        ({"data": 7}, "stage.data: expected a list, found 7"),
        ({"decisions": [{}]}, "decisions"),
        ({"parts": {"x": "012"}}, 'expected texts of "0" and "1"'),
        ({"more": 1}, "stage.more: expected no such field"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(FileProblem, match=message):
        Stage.from_json(stage("a", "b").to_json() | change, 2, 4)


def test_the_data_of_a_resumed_run_train_what_they_trained():
    saved = stage("a", "b", branch_step=3)
    assert saved.for_data(stage("b", "a")).data == [Trained("b", 1), Trained("a", 0)]  # in another order
    assert saved.for_data(stage("c", "d")) == saved  # files with other names
    assert saved.for_data(stage("b", "c")).data == [Trained("b", 1), Trained("a", 0)]  # a has another name
    twice = Stage(0, None, [Trained("a", 0), Trained("a", 0), None])
    assert twice.for_data(stage("c", "a", "d")).data == [Trained("a", 0), Trained("a", 0), None]
    other = saved.for_data(stage("a", "b", "c"))
    assert (other.branch_step, other.data) == (3, stage("a", "b", "c").data)
