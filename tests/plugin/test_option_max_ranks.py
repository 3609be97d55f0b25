"""--equivcheck-max-ranks N: cases with more processes are skipped, loudly."""

from __future__ import annotations

import threading
import time

import pytest

from equivcheck.plugin import slots

SOURCE = """
import pytest

@pytest.mark.equivcheck(accumulation_steps=2, strategy="ddp")
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_it(equivcheck, world_size):
    equivcheck('good.py', world_size=world_size)
"""


def test_cases_above_it_skip_with_the_reason(stubbed, ran):
    """The reason names the option and both numbers."""
    found = stubbed(SOURCE, "--equivcheck-max-ranks=2", "-rs")

    found.assert_outcomes(passed=2, skipped=1)
    assert [case.world_size for case in ran] == [1, 2]
    found.stdout.fnmatch_lines(
        ["SKIPPED*world_size 4 needs --equivcheck-max-ranks 4, 2 are allowed here"]
    )


def test_the_rest_of_a_test_still_runs(stubbed, ran):
    """One call with several numbers of ranks: those that fit are checked, the others are named in its report."""
    found = stubbed(
        """
        def test_it(equivcheck):
            equivcheck('good.py', accumulation_steps=2, world_size=[1, 8], strategy="ddp")
        """,
        "--equivcheck-max-ranks=2",
        "-rP",
    )

    found.assert_outcomes(passed=1)
    assert [case.world_size for case in ran] == [1]
    found.stdout.fnmatch_lines(["*note*world_size 8 needs --equivcheck-max-ranks 8*"])


def test_by_default_there_are_as_many_as_cores(stubbed, monkeypatch):
    """A machine of two cores does not start four processes unasked."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)

    stubbed(SOURCE).assert_outcomes(passed=2, skipped=1)


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_a_wrong_value_is_a_usage_error(stubbed, value):
    """Zero processes can check nothing."""
    found = stubbed(SOURCE, f"--equivcheck-max-ranks={value}")

    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines([f"*'{value}' is no whole number of at least 1*"])


def test_workers_share_the_places(tmp_path):
    """Never more than the limit at a time, and nobody waits for ever."""
    running, most, lock = 0, [0], threading.Lock()

    def work(count):
        nonlocal running
        with slots.taken(tmp_path, count, 3):
            with lock:
                running += count
                most.append(running)
            time.sleep(0.02)
            with lock:
                running -= count

    threads = [threading.Thread(target=work, args=(1 + number % 3,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    assert not any(thread.is_alive() for thread in threads)
    assert 1 <= max(most) <= 3
