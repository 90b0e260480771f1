"""A verdict as continuous integration reads it: JUnit XML, a job summary, annotations."""

import re
from collections.abc import Mapping
from typing import Any, Final
from xml.etree import ElementTree as ET

from pipeline.report import check_line, markdown

SUMMARY_BYTES: Final = 1_000_000
"""GitHub takes 1 MiB a step.
https://docs.github.com/actions/reference/workflows-and-actions/workflow-commands
"""
FORBIDDEN: Final = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""https://www.w3.org/TR/xml/#charsets"""
ORDER: Final = ("fail", "inconclusive", "pass")
LEVELS: Final = {"pass": "notice", "fail": "error", "inconclusive": "warning"}


def junit(report: Mapping[str, Any]) -> str:
    """Return JUnit XML, one case a check; one that cannot be decided is a failure, too."""
    checks = report["verdict"]["checks"]
    missed = [check for check in checks if check["outcome"] != "pass"]
    count = {"tests": str(len(checks)), "failures": str(len(missed))}
    root = ET.Element("testsuites", count)
    suite = ET.SubElement(root, "testsuite", {"name": "secateur", **count})
    for check in checks:
        about = {"classname": "secateur.gate", "name": _of_xml(check["what"])}
        case = ET.SubElement(suite, "testcase", about)
        if check["outcome"] != "pass":
            said = {"type": check["outcome"], "message": _of_xml(check_line(check))}
            ET.SubElement(case, "failure", said)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _of_xml(text: str) -> str:
    """Return the text with a mark in place of what XML 1.0 cannot hold, escaped or not."""
    return FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def summary(report: Mapping[str, Any]) -> str:
    """Return report.md, or as much of it as a job summary may hold."""
    text = markdown(report)
    if len(text.encode()) <= SUMMARY_BYTES:
        return text
    kept = text.encode()[:SUMMARY_BYTES].decode(errors="ignore")
    return kept.rpartition("\n")[0] + "\n\n(cut short)\n"


def annotations(report: Mapping[str, Any]) -> list[str]:
    """Return GitHub's workflow commands, one a check, the worst first: it shows ten of a kind."""
    checks = sorted(report["verdict"]["checks"], key=lambda check: ORDER.index(check["outcome"]))
    return [
        f"::{LEVELS[check['outcome']]} title=secateur::{_escaped(check_line(check))}"
        for check in checks
    ]


def _escaped(text: str) -> str:
    """Return a message as a workflow command holds it."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
