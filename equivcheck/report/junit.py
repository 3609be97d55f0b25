"""JUnit XML, which GitLab, Jenkins and test summaries read: one testcase per case."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as ET

from equivcheck.report import text, words
from equivcheck.result import case_exit_code


def render(result: Mapping[str, Any]) -> str:
    """Return the result as JUnit XML; a case that decides nothing, or has not run, is an error, never a pass."""
    cases = result["cases"]
    missing = words.interrupted(result)
    found = [case_exit_code(case) for case in cases]
    suite = ET.Element(
        "testsuite",
        name="equivcheck",
        tests=str(len(cases) + bool(missing)),
        failures=str(sum(code == 1 for code in found)),
        errors=str(sum(code not in (0, 1) for code in found) + bool(missing)),
        skipped="0",
        time=f"{sum(case.get('seconds') or 0 for case in cases):.3f}",
    )
    for case, code in zip(cases, found, strict=True):
        suite.append(_testcase(case, code))
    if missing:
        rest = ET.SubElement(suite, "testcase", classname="equivcheck", name="the rest of the run")
        ET.SubElement(rest, "error", type="interrupted", message=missing).text = text.UNFINISHED
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _testcase(case: Mapping[str, Any], code: int) -> ET.Element:
    element = ET.Element(
        "testcase",
        classname=text.printable(case.get("target", "")),
        name=text.printable(f"{words.label(case)} [{case['id']}]"),
        time=f"{case.get('seconds') or 0:.3f}",
    )
    properties = ET.SubElement(element, "properties")
    gradients = (case.get("divergence") or {}).get("gradients") or {}
    facts = {
        "case_id": case["id"],
        "verdict": case["verdict"],
        "causes": ",".join(words.codes(case)),
        "relative": gradients.get("relative"),
        "scale": gradients.get("scale"),
    }
    for name, value in facts.items():
        if value not in (None, ""):
            ET.SubElement(properties, "property", name=f"equivcheck.{name}", value=str(value))
    if code:
        kind = next(iter(words.codes(case)), case["verdict"])
        message = text.printable(words.headline(case))
        tag = "failure" if code == 1 else "error"
        ET.SubElement(element, tag, type=kind, message=message).text = text.block(case)
    return element
