"""The marker: defaults for a test, checked when the test is collected."""

from __future__ import annotations

import pytest


def test_it_gives_a_test_its_options(stubbed, ran):
    """The call is over the test's marker, that over the module's, that over the file."""
    found = stubbed(
        """
        import pytest

        pytestmark = pytest.mark.equivcheck(accumulation_steps=8, seed=3, split="uneven")

        @pytest.mark.equivcheck(accumulation_steps=[2, 4], optimizer_steps=5)
        def test_it(equivcheck):
            equivcheck("good.py", split="even")

        def test_without():
            pass
        """
    )

    found.assert_outcomes(passed=2)
    assert [(c.accumulation_steps, c.seed, c.split, c.optimizer_steps) for c in ran] == [
        (2, 3, "even", 5),
        (4, 3, "even", 5),
    ]


def test_axes_may_have_several_values(stubbed, ran):
    """Every combination is a case."""
    stubbed(
        """
        import pytest

        @pytest.mark.equivcheck(accumulation_steps=2, split=["even", "uneven"], precision=["a", "b"])
        def test_it(equivcheck):
            equivcheck("good.py")
        """
    ).assert_outcomes(passed=1)

    assert [(c.split, c.precision) for c in ran] == [
        ("even", "a"),
        ("even", "b"),
        ("uneven", "a"),
        ("uneven", "b"),
    ]


@pytest.mark.parametrize(
    ("marker", "told"),
    [
        ("acumulation_steps=4", ["*unknown keyword 'acumulation_steps'*", "*did you mean accum*"]),
        ("accumulation_steps=0", ["*accumulation_steps is 0*", "*::test_it*", "*at least 1*"]),
        ("split=['even', 'odd']", ["*split is 'odd'*", "*one of even, uneven*"]),
        ("expect=['EQ999']", ["*expect is *", "*a code that*"]),
        ("4", ["*4 without a keyword*"]),
    ],
)
def test_a_mistake_ends_the_collection(stubbed, ran, marker, told):
    """Before anything runs, as a usage error with the test's name."""
    found = stubbed(
        f"import pytest\n@pytest.mark.equivcheck({marker})\ndef test_it(equivcheck):\n    equivcheck('good.py')\n"
    )

    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines(told)
    assert ran == []


def test_a_marker_without_the_fixture_is_refused(stubbed):
    """Nothing would be checked, and the test would pass."""
    found = stubbed(
        "import pytest\n@pytest.mark.equivcheck(seed=1)\ndef test_it():\n    assert True\n"
    )

    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines(["*does not take the fixture*", "*def test_it(equivcheck): ...*"])


def test_it_is_registered(stubbed):
    """So `--strict-markers` knows it, and `pytest --markers` explains it."""
    source = "import pytest\n@pytest.mark.equivcheck(seed=1)\ndef test_it(equivcheck):\n    equivcheck('good.py')\n"

    stubbed(source, "--strict-markers").assert_outcomes(passed=1)
    stubbed("", "--markers").stdout.fnmatch_lines(["@pytest.mark.equivcheck(*"])
