"""The fixture: what a test gets, what it may say, and what its failure looks like."""

from __future__ import annotations

import json


def test_a_check_that_holds_is_silent(stubbed):
    """The test passes, and one line at the end says so with the margin."""
    found = stubbed("def test_it(equivcheck):\n    equivcheck('good.py')\n")

    found.assert_outcomes(passed=1)
    found.stdout.fnmatch_lines(["equivcheck: 2 cases equivalent, margin >= 57x"])
    found.stdout.no_fnmatch_line("*= equivcheck =*")


def test_a_divergence_fails_with_the_cause_first(stubbed):
    """The first line of the error, and the short summary, have code, name and number."""
    found = stubbed(
        "def test_it(equivcheck):\n    equivcheck('EQ101.py', accumulation_steps=4)\n", "-rf"
    )

    found.assert_outcomes(failed=1)
    found.stdout.fnmatch_lines(
        [
            ">       equivcheck('EQ101.py', accumulation_steps=4)",
            "E       equivcheck.DivergenceError: EQ101 missing-division: 4.000x the full batch's*",
            "E*replay    pytest test_step.py::test_it --equivcheck-replay *",
            "EQ101 missing-division: 1 case in 1 test",
            "          4.000x the full batch's gradient (K=4)",
            "FAILED *::test_it - equivcheck.DivergenceError: EQ101*",
        ]
    )
    # The reader sees the own test, not the inside of the plugin.
    found.stdout.no_fnmatch_line("*checker.py*")


def test_measure_never_raises_for_a_divergence(stubbed):
    """The result is data; the summary calls it measured, since the test passed."""
    found = stubbed(
        """
        def test_it(equivcheck):
            result = equivcheck.measure('EQ101.py', accumulation_steps=4)
            assert (result.verdict, result.exit_code) == ("divergent", 1)
            assert (result.worst.scale, result.worst.cause) == (4.0, "EQ101")
        """
    )

    found.assert_outcomes(passed=1)
    found.stdout.fnmatch_lines(["equivcheck: 1 case measured as divergent (EQ101)"])


def test_check_is_the_call(stubbed):
    """`equivcheck.check(...)` means the same with the fixture and with the package."""
    found = stubbed("def test_it(equivcheck):\n    equivcheck.check('EQ306.py')\n")

    found.assert_outcomes(failed=1)
    found.stdout.fnmatch_lines(["*DivergenceError: EQ306 clip-per-micro-batch*"])


def test_an_expected_cause_passes(stubbed):
    """And is counted, with its code."""
    found = stubbed(
        "def test_it(equivcheck):\n"
        "    equivcheck('EQ201.py', accumulation_steps=2, expect=['EQ201'])\n"
    )

    found.assert_outcomes(passed=1)
    found.stdout.fnmatch_lines(["equivcheck: 1 case expected (EQ201)"])


def test_an_expected_cause_that_is_missing_fails(stubbed):
    """Only that cause, and that cause, passes."""
    found = stubbed(
        """
        def test_absent(equivcheck):
            equivcheck('good.py', expect=['EQ201'])

        def test_another(equivcheck):
            equivcheck('EQ101.py', expect=['EQ201'])
        """
    )

    found.assert_outcomes(failed=2)
    found.stdout.fnmatch_lines(
        ["*DivergenceError: EQ201 batch-statistics: declared, but not found*"]
    )


def test_the_summary_says_what_was_declared_and_not_found(stubbed):
    """That a case is equivalent is no reason for a test to fail; nor is it where another case of the test is."""
    found = stubbed(
        """
        def test_absent(equivcheck):
            equivcheck('good.py', accumulation_steps=2, expect=['EQ201'])

        def test_measured(equivcheck):
            equivcheck.measure('good.py', accumulation_steps=4, expect=['EQ201'])

        def test_another(equivcheck):
            equivcheck('good.py', accumulation_steps=2)
            equivcheck('EQ101.py', accumulation_steps=2)
        """
    )

    found.stdout.fnmatch_lines(
        [
            "declared EQ201 not found: 1 case in 1 test",
            "equivcheck: 1 case measured as equivalent (declared EQ201 not found), 1 *in a test that failed, *57x",
        ]
    )


def test_what_cannot_be_decided_does_not_pass(stubbed):
    """Each end has its own error."""
    found = stubbed(
        """
        import pytest

        @pytest.mark.parametrize("target", ["inconclusive.py", "invalid.py", "raises.py"])
        def test_it(equivcheck, target):
            equivcheck(target)
        """
    )

    found.assert_outcomes(failed=3)
    found.stdout.fnmatch_lines(
        ["E*InconclusiveError: inconclusive*", "E*StepError: StepError: train-raised"]
    )


def test_an_unknown_keyword_is_an_error(stubbed):
    """With the closest one."""
    found = stubbed("def test_it(equivcheck):\n    equivcheck('good.py', acumulation_steps=4)\n")

    found.assert_outcomes(failed=1)
    found.stdout.fnmatch_lines(
        ["E*UsageError: unknown keyword 'acumulation_steps'*", "E*did you mean accumulation_steps?"]
    )


def test_a_wrong_call_shows_the_test_and_no_frame_of_ours(real):
    """Wherever it is found to be wrong: the reader sees the own line, and what to write instead."""
    found = real(
        """
        import pytest
        import train_step as good

        def named(net, loader, accumulation_steps): ...

        def raising():
            raise OSError("no such data")

        @pytest.mark.parametrize("call", [
            lambda check: check(good, accumulation_steps=0),
            lambda check: check(good, accumulation_steps=64),
            lambda check: check(good, expect=["EQ999"]),
            lambda check: check("train_stpe.py"),
            lambda check: check(None),
            lambda check: check(good.train),
            lambda check: check(good, build=good.build()),
            lambda check: check(good, train=named),
            lambda check: check(good, batches=raising),
            lambda check: check(good, acumulation_steps=2),
        ])
        def test_it(equivcheck, call):
            call(equivcheck)
        """
    )

    found.assert_outcomes(failed=10)
    found.stdout.no_fnmatch_line("*equivcheck/*.py:*")
    found.stdout.no_fnmatch_line("*contextlib*")
    found.stdout.no_fnmatch_line("*with commas*")
    found.stdout.no_fnmatch_line("*did you mean EQ*")
    found.stdout.fnmatch_lines_random(
        [
            "E*accumulation_steps is 0",
            "E*a whole number of at least 1, or several in a list, as in [[]2, 4[]]",
            "E*expect is 'EQ999'",
            "E*a code that `equivcheck explain` lists*",
            "E*did you mean train_step.py?",
            "E*no-subject: the call names nothing to check",
            "E*build=..., batches=..., train=train",
            "E*not-a-function: build= is Sequential",
            "E*asks for 'net'",
            ">*raise OSError*",
        ]
    )


def test_closures_are_named_after_their_test(stubbed, ran):
    """So two of them in one test are two cases, with two ids."""
    found = stubbed(
        """
        def good(): ...

        def test_it(equivcheck):
            for _ in range(2):
                equivcheck(build=good, batches=good, train=good, accumulation_steps=2)
        """
    )

    found.assert_outcomes(passed=1)
    first, second = (case.target for case in ran)
    assert first.endswith("::test_it")
    assert second == f"{first} #2"


def test_a_path_beside_the_test_file_is_found(stubbed, pytester, ran):
    """Whatever folder pytest was started in; one that exists there is taken first."""
    folder = pytester.mkdir("inner")
    (folder / "step.py").write_text("", encoding="utf-8")
    (folder / "test_step.py").write_text(
        "import pathlib\ndef test_it(equivcheck):\n"
        "    equivcheck('step.py', accumulation_steps=2)\n"
        "    equivcheck(pathlib.Path('step.py'), accumulation_steps=2)\n",
        encoding="utf-8",
    )
    stubbed("", "inner").assert_outcomes(passed=1)
    (pytester.path / "step.py").write_text("", encoding="utf-8")
    stubbed("", "inner").assert_outcomes(passed=1)

    assert [case.target for case in ran] == [str(folder / "step.py")] * 2 + ["step.py"] * 2


def test_a_fixture_that_is_never_called_is_told(stubbed):
    """A test that compared nothing passes, but not in silence."""
    found = stubbed("def test_it(equivcheck):\n    pass\n")

    found.assert_outcomes(passed=1)
    found.stdout.fnmatch_lines(["never called: the fixture of *::test_it"])


def test_the_table_of_parameters_is_a_section(stubbed):
    """Twenty rows, or all of them with -v."""
    source = "def test_it(equivcheck):\n    equivcheck('EQ101.py', accumulation_steps=4)\n"
    short = stubbed(source)
    long = stubbed("", "-v")

    short.stdout.fnmatch_lines(
        ["*Captured equivcheck call*", "*layers.19.weight*", "*10 more with -v*"]
    )
    short.stdout.no_fnmatch_line("*layers.20.weight*")
    long.stdout.fnmatch_lines(["*layers.29.weight*"])


def test_junit_has_the_facts(stubbed, pytester):
    """As properties of the testcase, where GitLab and Jenkins look for them."""
    stubbed(
        "def test_it(equivcheck):\n    equivcheck('EQ101.py', accumulation_steps=4)\n",
        "--junitxml=junit.xml",
    )
    page = (pytester.path / "junit.xml").read_text(encoding="utf-8")

    for name, value in (("cause", "EQ101"), ("scale", "4.0"), ("relative", "3.0")):
        assert f'<property name="equivcheck.{name}" value="{value}"' in page
    assert '<property name="equivcheck.case_id" value="' in page


def test_a_plain_check_in_a_test_is_reported_too(stubbed, pytester):
    """`equivcheck.check` without the fixture: its divergence is counted and written."""
    found = stubbed(
        """
        import equivcheck

        def test_it():
            equivcheck.check('EQ101.py', accumulation_steps=4)
        """,
        "--equivcheck-json=r.json",
    )

    found.stdout.fnmatch_lines(["EQ101 missing-division: 1 case in 1 test"])
    [case] = json.loads((pytester.path / "r.json").read_text(encoding="utf-8"))["cases"]
    assert case["test"].endswith("::test_it")


def test_an_xfail_is_no_news(stubbed):
    """A divergence in a test that is expected to fail is not told as one."""
    found = stubbed(
        """
        import pytest

        @pytest.mark.xfail(strict=True)
        def test_it(equivcheck):
            equivcheck('EQ101.py', accumulation_steps=4)
        """
    )

    found.assert_outcomes(xfailed=1)
    found.stdout.fnmatch_lines(["equivcheck: 1 case xfailed: divergent (EQ101)"])


def test_a_check_in_a_fixture_is_an_error_of_its_test(stubbed):
    """Facts are read from whatever phase they come from."""
    found = stubbed(
        """
        import pytest

        @pytest.fixture
        def checked(equivcheck):
            return equivcheck('EQ101.py', accumulation_steps=4)

        def test_it(checked): ...
        """
    )

    found.assert_outcomes(errors=1)
    found.stdout.fnmatch_lines(["EQ101 missing-division: 1 case in 1 test"])
