"""`megalign doctor`: is this machine, or this cluster, fit for a run? One line a fact, with a verdict and what to do.

Bare, it looks at this machine and starts a few local ranks. As a rank of a world that torchrun, srun or mpirun
started, it looks at every node of that world and at what lies between them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megalign.doctor.findings import Finding, worst
from megalign.doctor.folder import folder_findings
from megalign.doctor.machine import machine_findings

RESULT = "MEGALIGN_DOCTOR_RESULT"  # where rank 0 of local ranks leaves its findings for the process that started them
_STYLE = {"ok": "green", "warning": "yellow", "broken": "bold red"}


def examine_alone(folder: Path, ranks: int, *, min_free_gb: float) -> list[Finding]:
    """This machine, the folder, and `ranks` local ranks that talk to each other."""
    from megalign.parallel.local import launch

    findings = machine_findings(local_ranks=ranks) + folder_findings(folder, min_free_gb=min_free_gb)
    with tempfile.TemporaryDirectory() as logs:
        result = Path(logs) / "result.json"
        os.environ[RESULT] = str(result)
        try:
            code = launch(sys.argv[1:], ranks, Path(logs) / "logs")
        finally:
            del os.environ[RESULT]
        if code or not result.exists():
            return [*findings, no_world(f"{ranks} local ranks ended with exit code {code}; their message is above")]
        return findings + [Finding(**row) for row in json.loads(result.read_text())]


def no_world(why: str) -> Finding:
    """The ranks did not come together."""
    fix = "the address and port of rank 0 must be reachable (firewall?); with several networks name one: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
    return Finding("ranks", "world", why, "broken", fix)


def show(findings: list[Finding], console: Console | None = None) -> None:
    """The table, broken things last, where a terminal ends."""
    table = Table(title="megalign doctor", title_justify="left", show_lines=False)
    for name in ("what", "found", "verdict", "what to do"):
        table.add_column(name, overflow="fold")
    section = None
    for finding in findings:
        if section is not None and finding.section != section:
            table.add_section()
        section = finding.section
        table.add_row(f"{finding.section}: {finding.item}", finding.value, f"[{_STYLE[finding.verdict]}]{finding.verdict}[/]", finding.fix)
    console = console or Console()
    console.print(table)
    counts = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in _STYLE}
    console.print(f"{counts['ok']} ok, {counts['warning']} to look at, {counts['broken']} broken", style=_STYLE[worst(findings)])
