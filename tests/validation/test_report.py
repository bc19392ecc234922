"""Lines, JSON and annotations."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from dylora_moe.validation.report import Printer, Report, annotate, write_text
from dylora_moe.validation.saved import CheckResult


@pytest.fixture
def report():
    good = CheckResult("save", measures={"max_abs_diff": float("inf"), "list": [float("nan"), 1.0]}, seconds=1.26)
    bad = CheckResult("structure", problems=[f"file {i}: wrong" for i in range(12)])
    return Report("minimal", model="m", experts=2, checks=[good, bad], total_bytes=29558709, exit_code=1)


def test_last_lines(report, capsys):
    Printer().summary(report, "ALL TESTS PASSED")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-5:] == [
        "✓ PASS: save",
        "✗ FAIL: structure",
        "✗ SOME TESTS FAILED",
        "",
        "Total checkpoint size: 28.2 MB",
    ]
    report.checks.pop()
    Printer().summary(report, "ALL TESTS PASSED")
    assert capsys.readouterr().out.splitlines()[-4:] == ["✓ PASS: save", "✓ ALL TESTS PASSED", "", lines[-1]]


def test_at_most_ten_problems(report, capsys):
    Printer().result(report.checks[1])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "✗ file 0: wrong"
    assert lines[10] == "  ... and 2 more"


def test_json_is_strict(report):
    value = json.loads(report.as_json(), parse_constant=pytest.fail)
    assert value["passed"] is False
    assert value["checks"][0]["measures"] == {"max_abs_diff": "inf", "list": ["nan", 1.0]}
    assert len(value["checks"][1]["problems"]) == 12


def test_passed_needs_checks_and_no_error():
    assert not Report("minimal").passed
    assert Report("minimal", checks=[CheckResult("save")]).passed
    assert not Report("minimal", checks=[CheckResult("save")], error="interrupted").passed


def test_json_goes_to_a_file_or_to_standard_output(report, tmp_path, capsys):
    write_text(report.as_json(), str(tmp_path / "x.json"))
    write_text(report.as_json(), "-")
    assert (tmp_path / "x.json").read_text() == capsys.readouterr().out == report.as_json()


def test_junit_has_a_case_for_each_check(report):
    report.checks[1].problems = ["a <b> & \x1b[2J", "second"]
    suites = ElementTree.fromstring(report.as_junit())
    assert suites.attrib == {"tests": "2", "failures": "1", "errors": "0", "time": "0.000"}
    good, bad = suites.iter("testcase")
    assert (good.attrib, len(good)) == ({"classname": "minimal", "name": "save", "time": "1.260"}, 0)
    assert bad.find("failure").attrib == {"message": "a <b> & \\x1b[2J"}
    assert bad.find("failure").text == "a <b> & \\x1b[2J\nsecond"
    stopped = Report("minimal", error="no\nmemory", exit_code=2)
    (case,) = ElementTree.fromstring(stopped.as_junit()).iter("testcase")
    assert (case.find("error").get("message"), case.find("error").text) == ("no", "no\nmemory")


def test_annotations(report, capsys, monkeypatch, tmp_path):
    annotate(report, Printer())
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    report.checks[1].problems = ["a | b\n100% <script>"]
    report.error = "no\nmemory"
    annotate(report, Printer())
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "::error title=minimal structure::a | b%0A100%25 <script>",
        "::error title=minimal::no%0Amemory",
    ]
    table = (tmp_path / "summary").read_text().splitlines()
    assert "| structure | ✗ FAIL | 0.0 | a \\| b 100% &lt;script> |" in table
    assert "Total checkpoint size: 28.2 MB" in table


def test_a_summary_that_cannot_be_written_is_no_failure(report, capsys, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "/no/such/folder/summary")
    annotate(report, Printer())
    assert "cannot be written" in capsys.readouterr().err
