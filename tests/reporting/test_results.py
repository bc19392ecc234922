"""results.json: what is written is read again, and nothing else is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dylora_moe.errors import UsageError
from dylora_moe.reporting.publish import REPORT, check_results, write_report, write_results
from dylora_moe.reporting.results import KIND, RESULTS, decode_results, encode_results, read_results
from dylora_moe.store.files import FileProblem, parse_json

from ..support.results import joint, sample, unmeasured


@pytest.mark.parametrize("results", [sample(), sample(1, 0), joint(), unmeasured()])
def test_what_is_written_is_read_again(results, tmp_path):
    write_results(tmp_path, results)
    read = read_results(tmp_path)
    assert encode_results(read) == (tmp_path / RESULTS).read_bytes() == encode_results(results)
    assert [skill.name for skill in read.skills] == [skill.name for skill in results.skills]
    page = (tmp_path / REPORT).read_bytes()
    (tmp_path / REPORT).unlink()
    assert write_report(tmp_path) == tmp_path / REPORT
    assert (tmp_path / REPORT).read_bytes() == page


def test_a_loss_that_is_not_finite_becomes_null():
    results = sample(1, 0)
    stage = replace(results.stages[0], curves={"a": [(1, float("nan")), (2, float("inf")), (3, 1.0000000001)]})
    found = json.loads(encode_results(replace(results, stages=[stage])))
    assert found["stages"][0]["curves"] == {"a": [[1, None], [2, None], [3, 1.0]]}


def changed(path: list, value: object) -> object:
    found = json.loads(encode_results(sample()))
    place = found
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return found


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (["kind"], "mine", "expected the results of a run"),
        (["format_version"], 2, "expected format_version 1, found 2"),
        (["format_version"], KeyError, "expected format_version 1, found none"),
        (["route"], "other", 'route: expected "specialised" or "joint", found \'other\''),
        (["route"], [], "route: expected"),
        (["skills"], KeyError, "skills: expected a value, found none"),
        (["surplus"], 1, "surplus: expected no such field"),
        (["experts"], True, "experts: expected a whole number, found True"),
        (["experts"], 0, "experts: expected 1 to 1024, found 0"),
        (["experts"], 10**20, "experts: expected a whole number"),
        (["stages", 0, "evaluation", "python", "base"], float("nan"), "evaluation.python.base: expected a number"),
        (["stages", 0, "evaluation", "python", "best_expert"], 4, "stages[0]: expected an expert from 0 to 3, found 4"),
        (["stages", 1, "skills"], ["nobody"], "stages[1]: expected names of skills, found nobody"),
        (["stages", 1, "first_step"], 9999, "expected its first step before its last, found 9999 and 480"),
        (["stages", 0, "curves", "trunk", 3], [1], "stages[0].curves.trunk[3]: expected a list of 2, found [1]"),
        (["skills", 1, "name"], "python", "expected each name once, found python 2 times"),
        (["skills", 1, "usage"], [1.0], "skills[1].usage: expected 4 shares or none, found 1"),
        (["skills", 1], None, "skills[1]: expected an object, found None"),
        (["examples", 0, "tokens", 2, 1], [1.0], "examples[0].tokens[2]: expected 4 weights, found 1"),
        (["versions"], ["torch"], "versions: expected an object"),
    ],
)
def test_each_contradiction_is_seen(path, value, problem):
    with pytest.raises(FileProblem) as caught:
        decode_results(changed(path, value))
    assert problem in str(caught.value)


def test_what_is_sound_has_no_problem():
    assert decode_results(changed(["experts"], 4)) == decode_results(parse_json(encode_results(sample())))


@pytest.mark.parametrize("name", [RESULTS, REPORT])
@pytest.mark.parametrize("content", [b"mine", b"{}", b"<html>mine</html>", b""])
def test_a_file_of_the_user_is_never_replaced(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    for refused in (lambda: check_results(tmp_path), lambda: write_results(tmp_path, sample())):
        with pytest.raises(UsageError, match=f"{name}: expected what a run wrote"):
            refused()
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [name]
    assert (tmp_path / name).read_bytes() == content


def test_files_of_earlier_runs_are_replaced(tmp_path):
    (tmp_path / RESULTS).write_text(json.dumps({"kind": KIND, "step": 1}))  # as 0.2.1 wrote it
    check_results(tmp_path)
    write_results(tmp_path, sample())
    write_results(tmp_path, sample(2))
    assert len(read_results(tmp_path).skills) == 2
