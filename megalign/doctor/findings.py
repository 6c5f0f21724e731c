"""What the doctor found: a fact, its verdict, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of the table. `broken`: a run will fail or lose data; `warning`: it will be slow, or odd."""

    section: str  # versions, machine, devices, folder, ranks
    item: str
    value: str
    verdict: Verdict = "ok"
    fix: str = ""


def worst(findings: Iterable[Finding]) -> Verdict:
    """The gravest verdict."""
    verdicts = {finding.verdict for finding in findings}
    return "broken" if "broken" in verdicts else "warning" if "warning" in verdicts else "ok"


def over_nodes(by_node: dict[str, list[Finding]]) -> list[Finding]:
    """One list for many nodes: what is equal everywhere once, what differs a line a node.

    A version that differs between nodes is broken though each may be good for itself.
    """
    merged: dict[Finding, list[str]] = {}
    for node, findings in by_node.items():
        for finding in findings:
            merged.setdefault(finding, []).append(node)
    result = []
    for finding, nodes in merged.items():
        if len(nodes) == len(by_node):
            result.append(finding)
            continue
        verdict, fix = finding.verdict, finding.fix
        if finding.section == "versions" and verdict != "broken":
            verdict, fix = "broken", "install the same version on every node"
        result.append(Finding(finding.section, f"{finding.item} on {', '.join(nodes)}", finding.value, verdict, fix))
    return sorted(result, key=lambda finding: [f.section for f in result].index(finding.section))
