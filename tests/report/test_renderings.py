"""All renderings of a result, without a browser and without torch."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from html import unescape
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from equivcheck import noise
from equivcheck import result as results
from equivcheck.errors import UsageError
from equivcheck.report import (
    budget,
    changes,
    curves,
    github,
    html,
    index,
    junit,
    markdown,
    panels,
    slides,
    text,
    words,
)
from equivcheck.report.panels import measured
from equivcheck.report.scales import Decades

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "reports" / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))


def load(name):
    return json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_page_is_that_of_the_committed_result(name):
    """`make examples` has been run since a template changed."""

    assert (EXAMPLES / f"{name}.html").read_text(encoding="utf-8") == html.render(load(name))


def test_the_index_links_every_example():
    """And is the page that `make examples` writes."""
    page = index.page({f"{name}.html": load(name) for name in NAMES})

    assert (EXAMPLES / "index.html").read_text(encoding="utf-8") == page
    assert all(f'href="{name}.html"' in page for name in NAMES)


def test_there_is_an_example_of_every_mutant():
    """One per cause that one process can show, and per cause that takes several."""
    mutants = HERE.parents[1] / "fixtures" / "mutants"
    files = [*mutants.glob("eq*.py"), *(mutants / "ranks").glob("eq5*.py")]

    assert {path.name[:5].upper() for path in files} <= set(NAMES)


def test_cases_with_one_finding_share_a_block():
    """The first in full, the others in a line each with their own numbers; another finding has its own block."""
    cases = [case for case in load("several")["cases"] if words.failed(case)]
    found = text.blocks(cases)

    assert len(found) == 2
    first, second = cases[:2]
    assert found[0].startswith(text.block(first).splitlines()[0])
    [line] = [each for each in found[0].splitlines() if second["id"] in each]
    assert line.split() == [second["id"], "K=4", "3.0e+00", "4.000", line.split()[-1]]
    assert max(map(len, found[0].splitlines())) <= text.WIDTH
    assert text.blocks(cases[:1]) == [text.block(first)]


@pytest.mark.parametrize(
    ("key", "other"), [("verdict", "precision-loss"), ("target", "other.py"), ("workload", "w")]
)
def test_other_findings_have_blocks_of_their_own(key, other):
    """Cases of another subject, or with another verdict, are not put together."""
    case = load("EQ101")["cases"][0]

    assert len(text.blocks([case, {**case, "id": "0123456789", key: other}])) == 2
    assert len(text.blocks([case, {**case, "id": "0123456789"}])) == 1


def test_notes_of_all_cases_are_in_their_block():
    """None is lost, and none is said twice."""
    case = load("EQ101")["cases"][0]
    both = [{**case, "notes": ["first", "shared"]}, {**case, "notes": ["shared", "second"]}]

    [found] = text.blocks(both)

    assert [found.count(f"note      {each}\n") for each in ("first", "shared", "second")] == [
        1,
        1,
        1,
    ]


def test_a_warning_says_what_was_measured():
    """Counts and bytes, in the text, the page, the summary and the annotation of a workflow."""
    found = load("EQ503")
    told = "4 reductions (98.5 kB) per optimizer step, where 1 reduction (24.6 kB) would do"

    assert found["cases"][0]["verdict"] == "equivalent"
    for shown in (text.render(found), markdown.render(found), html.render(found)):
        assert told in " ".join(unescape(shown).split())
    [command] = github.commands(found)
    assert command.startswith("::warning ")
    assert told in command


def paths(value, place=()):
    """Yield the place of every key in nested mappings, of each list the first item."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*place, key)
            yield from paths(item, (*place, key))
    elif isinstance(value, list) and value:
        yield from paths(value[0], (*place, 0))


@pytest.mark.parametrize("name", ["EQ306", "EQ303", "EQ602"])
def test_a_result_without_some_key_renders(name):
    """Whatever a version did not write yet, no rendering asks for it in vain; `id` and `verdict` are given."""
    whole = load(name)
    needed = {
        "id",
        "verdict",
        "cases",
        "schema",
        "code",
        "status",
        "kind",
        "name",
        "event",
        "optimizer_step",
    }
    needed |= {
        "micro_step",
        "events",
        "rows",
        "relative",
        "multiple",
        "parameters",
        "full_batch",
        "accumulated",
    }
    for place in list(paths(whole)):
        if place[-1] in needed:
            continue
        less = copy.deepcopy(whole)
        holder = less
        for key in place[:-1]:
            holder = holder[key]
        del holder[place[-1]]
        for render in (html.render, text.render, markdown.render, junit.render, slides.render):
            try:
                assert render(less) is not None
            except Exception as error:
                raise AssertionError((place, render.__module__)) from error


@pytest.mark.parametrize("name", ["EQ306", "EQ303", "EQ602"])
@pytest.mark.parametrize("other", ["text", 1.5, [1], {"a": 1}], ids=repr)
def test_what_is_of_another_kind_is_refused_or_rendered(tmp_path, name, other):
    """Whatever is edited by hand: the file is refused with the place, or every rendering takes it."""
    whole = load(name)
    path = tmp_path / "result.json"
    refused = 0
    for place in list(paths(whole)):
        changed = copy.deepcopy(whole)
        holder = changed
        for key in place[:-1]:
            holder = holder[key]
        if type(holder[place[-1]]) is type(other):
            continue
        holder[place[-1]] = other
        path.write_text(json.dumps(changed), encoding="utf-8")
        try:
            loaded = results.load(path)
        except UsageError as error:
            assert str(place[-1]) in str(error)  # noqa: PT017 - either of two ends is right
            refused += 1
            continue
        for render in (html.render, text.render, markdown.render, junit.render, slides.render):
            try:
                assert render(loaded) is not None
            except Exception as error:
                raise AssertionError((place, render.__module__)) from error

    assert refused > 20


def test_nothing_here_loads_torch(tmp_path):
    """`report` and `diff` work where torch is not installed."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None\n"
        "from equivcheck.cli import main\n"
        f"a, b = {str(EXAMPLES / 'EQ306.json')!r}, {str(EXAMPLES / 'EQ101.json')!r}\n"
        "files = ['--html', 'a.html', '--junit', 'a.xml', '--markdown', 'a.md', '--svg', 'plots']\n"
        "assert main(['report', a, *files]) == 0\n"
        "assert main(['diff', a, b, '--html', 'd.html']) == 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert {"a.html", "a.xml", "a.md", "d.html", "plots"} <= {p.name for p in tmp_path.iterdir()}


def test_the_page_lets_no_other_script_run():
    """The policy names the page's own scripts by their hash; nothing is fetched from anywhere."""
    page = unescape(html.render(load("EQ306")))

    assert "default-src 'none'" in page
    assert page.count("sha256-") == 3
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script src" not in page
    assert '<link rel="stylesheet' not in page


def test_what_is_reduced_is_said(large, suite):
    """Within 1.5 MB where that is possible, and never above 5 MB."""
    pages = {name: html.render(r) for name, r in (("large", large), ("suite", suite))}

    assert all(len(page.encode()) <= budget.MOST for page in pages.values())
    assert "Reduced to fit this page" in pages["large"]
    assert "Reduced to fit this page" in pages["suite"]
    assert "Reduced to fit this page" not in html.render(load("EQ306"))


def test_an_absurd_result_still_fits(large):
    """20,000 parameters in each of 30 failing cases."""
    case = large["cases"][0]
    rows = [
        {**case["per_parameter"][0], "name": f"a_rather_long_name.of.a.parameter.{i}"}
        for i in range(20_000)
    ]
    cases = [{**case, "id": f"{i:010x}", "per_parameter": rows} for i in range(30)]
    page = html.render({**large, "cases": cases})

    assert len(page.encode()) <= budget.MOST


def test_thinning_keeps_the_worst():
    """A spike of one step in a thousand is drawn."""
    spike = [1e-16] * 1000
    spike[517] = 3.0
    series = {
        "optimizer_step": list(range(1000)),
        "of": 1000,
        "gradients": {"relative": spike, "control": [1e-16] * 1000},
    }
    found = budget._thinned(series, 64, [])

    assert len(found["optimizer_step"]) == len(found["gradients"]["relative"]) == 64
    assert max(found["gradients"]["relative"]) == 3.0
    assert found["optimizer_step"][found["gradients"]["relative"].index(3.0)] == 517


def test_every_rendering_says_that_cases_are_missing():
    """An interrupted run is no pass, however good what has run is."""
    cases = [{**load("equivalent")["cases"][0], "id": f"{n:010x}"} for n in range(4)]
    whole = {**load("equivalent"), "cases": cases, "interrupted": True, "planned": 6}
    told = "interrupted: 4 of 6 cases ran"
    suite = ET.fromstring(junit.render(whole)).find("testsuite")

    assert html.title(whole) == f"{told}; these 4 agree with the full batch"
    assert markdown.render(whole).startswith(f"### equivcheck: {told}\n")
    assert told in text.render(whole)
    assert "--resume" in text.render(whole)
    assert (suite.get("tests"), suite.get("errors")) == ("5", "1")
    assert suite.find("testcase/error").get("message") == told


def test_a_headline_counts_the_cases_that_have_the_cause():
    """A case that raised is none of them."""
    wrong, right = load("EQ103")["cases"][0], load("equivalent")["cases"][0]
    raised = {**right, "verdict": "error", "causes": [], "error": {"type": "StepError"}}
    whole = {**load("EQ103"), "cases": [wrong, raised, right]}

    assert html.title(whole) == "EQ103 mean-of-means in 1 of 3 cases, 1 error"


def test_a_section_of_several_says_what_to_do():
    """As the terminal does, also where there is no cause to show."""
    case = {**load("equivalent")["cases"][0], "verdict": "invalid", "expected": "a step or more"}
    case |= {"because": "no step was taken", "fix": "take one", "steps": None}
    whole = {**load("equivalent"), "cases": [case, {**case, "id": "0" * 10}]}
    page = html.render(whole)
    section = page[page.index('id="0000000000:told"') :].partition("</section>")[0]

    for name, said in (
        ("expected", "a step or more"),
        ("because", "no step was taken"),
        ("fix", "take one"),
    ):
        assert f"<dt>{name}</dt><dd>{said}</dd>" in section


def test_junit_has_a_testcase_per_case():
    """With the cause as the type of its failure."""
    root = ET.fromstring(junit.render(load("several")))
    failures = root.findall(".//failure")

    assert len(root.findall(".//testcase")) == len(load("several")["cases"])
    assert {each.get("type") for each in failures} == {"EQ101", "EQ306"}


def test_annotations_are_one_per_cause_and_ten_at_most(suite):
    """However many cases have it: the first speaks for the others and counts them."""
    said = github.commands(suite)
    assert len(said) == 5
    assert all("more case" in line.split("::")[1] for line in said)

    many = copy.deepcopy(load("EQ101"))
    many["cases"] = [
        {
            **many["cases"][0],
            "id": f"{i:010x}",
            "headline": "",
            "causes": [{**many["cases"][0]["causes"][0], "code": f"EQ{100 + i}"}],
        }
        for i in range(14)
    ]
    assert len(github.commands(many)) == 10
    assert "5 more causes" in github.commands(many)[-1]


def test_the_step_summary_stays_below_64_kb(suite):
    """In bytes, also when names are not ASCII, and it says what is left out."""
    named = copy.deepcopy(suite)
    for case in named["cases"]:
        case["target"] = "sültés/ß.py"
    page = markdown.render(named)

    assert len(page.encode()) <= 64_000
    assert "more cases in the result" in page


@pytest.mark.parametrize("name", ["EQ103", "EQ306", "EQ201"])
def test_slides_are_drawings_of_their_own(name):
    """Well-formed SVG that refers to nothing outside."""
    found = slides.render(load(name))

    assert {path.split("-", 1)[1] for path in found} == {
        "start.svg",
        "weights.svg",
        "proof.svg",
        "heatmap.svg",
    }
    for drawn in found.values():
        root = ET.fromstring(drawn)
        assert root.get("viewBox") == "0 0 960 540"
        assert "href" not in drawn


@pytest.mark.parametrize(
    ("value", "place"),
    [(1e-17, 0.0), (1.0, 100.0), (10**-8.5, 50.0), (0.0, 0.0), (float("inf"), 100.0), (None, 0.0)],
)
def test_places_on_an_axis(value, place):
    """Decades are evenly spaced; zero is at the foot."""

    assert Decades(-17, 0).place(value) == pytest.approx(place)


def test_an_axis_holds_its_values():
    """And at least the decades from rounding to one."""
    axis = Decades.over([3e-20, 2e5, None, 0.0])

    assert axis.low <= -20
    assert axis.high >= 6
    assert len(axis.ticks()) <= 8


def test_lines_break_where_a_number_is_absent():
    """A lone point becomes a dash."""
    axis = Decades(-16, 0)

    assert curves.path([0, 1, 2, 3], [1.0, None, 1e-8, 1e-16], axis) == "M0 0M66.67 50L100 100"
    assert curves.path([5], [1e-8], axis) == "M0 50L100 50"


@pytest.mark.parametrize(
    ("name", "panel", "said"),
    [
        ("EQ101", "weights", "Every micro-batch counts 4.000 times what it should."),
        ("EQ301", "weights", "Micro-batches 0, 1, 2 do not count at all."),
        ("EQ103", "weights", "All micro-batches count the same (0.2500)"),
        ("EQ201", "weights", "samples act on one another"),
        ("EQ303", "weights", "something changed within the cycle"),
        ("EQ105", "walk", "In optimizer_step 3 both runs make the same calls"),
        ("EQ101", "precision", "accumulating itself adds"),
        ("EQ306", "walk", "clip happens 3 times inside the cycle, after micro_step 0, 1, 2"),
        ("EQ303", "walk", "step happens 3 times inside the cycle"),
        ("EQ307", "start", "Learning rates differ from optimizer_step"),
        ("equivalent", "start", "The two runs agree at every optimizer step"),
        ("equivalent", "walk", "both runs make the same calls, and none inside the cycle"),
        ("EQ306", "parameters", "10 of 10 parameters differ by more than rounding"),
        ("equivalent", "control", "would have been seen"),
    ],
)
def test_panels_state_their_conclusion(name, panel, said):
    """In words, from the numbers of the result."""

    assert said in panels.of(load(name)["cases"][0])[panel]["told"]


def test_what_is_no_rounding_is_not_called_so():
    """Gradients that were there before the cycle are no rounding, and the number of roundoffs is that of the engine."""
    case = load("EQ302")["cases"][0]
    assert "accumulating itself adds" in panels.of(case)["precision"]["told"]
    case["precision_loss"] |= {"units": 1e6, "accumulation": 0.6}

    assert "accumulating" not in panels.of(case)["precision"]["told"]
    assert measured.UNITS == noise.UNITS


def test_weights_follow_a_count():
    """Theory weighs micro-batches by what they hold, and the page says by what."""
    found = panels.weights(load("EQ103")["cases"][0])

    assert [count["label"] for count in found["counts"] if count["followed"]]
    assert "The right weights follow the count of" in found["told"]


def test_weights_of_ranks_are_rows():
    """R lists of K."""
    case = copy.deepcopy(load("EQ101")["cases"][0])
    case["world_size"] = 2
    case["attribution"].update(
        reference_weights=[[0.125] * 4] * 2, candidate_weights=[[0.25] * 4, [0.0] * 4]
    )
    found = panels.weights(case)

    assert [row["rank"] for row in found["rows"]] == [0, 1]
    assert [bar["ratio"] for bar in found["rows"][1]["bars"]] == [0.0] * 4
    assert "rank 1" in html.render({**load("EQ101"), "cases": [case]})


@pytest.mark.parametrize(
    "ranks",
    [
        None,
        [{"rank": 0, "seconds": 1.0}, {"rank": 1, "parameters": ["a"]}],
        {"world_size": 2, "reduction": "mean"},
    ],
)
def test_whatever_is_known_of_ranks_is_shown(ranks):
    """A list, a mapping, or nothing."""
    case = {**load("EQ101")["cases"][0], "world_size": 2, "strategy": "ddp", "ranks": ranks}
    page = html.render({**load("EQ101"), "cases": [case]})

    assert "2 ranks, strategy ddp." in page
    assert ("reduction" in page) is isinstance(ranks, dict)


def changed():
    old, new = load("several"), load("several")
    fails = next(c for c in old["cases"] if words.failed(c))
    passes = next(c for c in old["cases"] if not words.failed(c))
    for case in new["cases"]:
        if case["id"] == fails["id"]:
            case.update(verdict="equivalent", causes=[], findings=[])
        if case["id"] == passes["id"]:
            case.update(verdict="divergent", causes=fails["causes"])
    new["cases"].pop()
    return old, new


def test_a_diff_names_every_change():
    """Broken first, and the page has a section for each."""
    old, new = changed()
    found = {each["what"] for each in changes.changes(old, new)}
    page = changes.page(old, new, ("old.json", "new.json"))

    assert found == {"fixed", "broken", "gone", "same"}
    assert "1 broken, 1 fixed, 1 gone; 5 same" in page
    assert page.index(">broken</span>") < page.index(">fixed</span>")
    assert changes.markdown(old, new).count("\n") == 5


@pytest.mark.parametrize(("factor", "what"), [(100.0, "worse"), (0.01, "better"), (2.0, "same")])
def test_a_failure_may_grow_or_shrink(factor, what):
    """By more than rounding moves it."""
    old, new = load("EQ306"), load("EQ306")
    for each in new["cases"][0]["findings"]:
        each["relative"] *= factor
    new["cases"][0]["divergence"]["gradients"]["relative"] *= factor

    assert [each["what"] for each in changes.changes(old, new)] == [what]


def test_vendored_files_are_what_they_say():
    """The hashes beside them are theirs."""
    import hashlib

    for folder in (HERE.parents[1] / "equivcheck" / "report" / "assets", HERE / "axe"):
        told = (folder / "README.md").read_text(encoding="utf-8")
        for path in folder.glob("*.min.*"):
            assert hashlib.sha256(path.read_bytes()).hexdigest() in told, path


def test_numbers_of_a_list_share_a_line():
    """And the text is still the same JSON, whatever strings hold."""
    value = {
        "schema": "x",
        "a": [1, 2.5, None],
        "b": ["[\n 1,\n 2\n]"],
        "c": [[], [True], [{"d": [-1e-16]}]],
    }
    told = results.to_json(value)

    assert json.loads(told) == value
    assert '"a": [1, 2.5, null]' in told


def test_of_trials_that_failed_the_closest_are_told_once_each():
    """A search makes dozens; what came closest, by the causes put right, is what a reader can use."""
    trials = [
        (["EQ309"], 0.5),
        (["EQ309"], 0.25),
        (["EQ101", "EQ309"], 0.125),
        (["EQ102", "EQ309"], None),
        (["EQ103", "EQ309"], 2.0),
        (["EQ101"], 0.0625),
    ]
    case = {"interventions": [{"codes": codes, "relative": left} for codes, left in trials]}
    cause = {"code": "EQ309", "status": "suspected", "evidence": {}}

    assert words.evidence(case, cause) == [
        "put right (EQ101, EQ309): 1.2e-01 is left",
        "put right (EQ309): 2.5e-01 is left",
        "put right (EQ103, EQ309): 2.0e+00 is left",
    ]
