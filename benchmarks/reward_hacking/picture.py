"""Pictures and tables of run.py, from its results alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalign.report.sheet import sheet
from megalign.report.svg import Curve
from megalign.rewards.overoptimisation import Curve as Fitted
from megalign.rewards.overoptimisation import fit_curve

Rows = list[dict[str, Any]]
ARMS = (("best of n", "best of n, proxy", 1), ("DPO, proxy", "dpo, proxy", 2), ("DPO, gold", "dpo, gold", 3))
CHOSEN = ("best of n, proxy", "best of n, reward model")
FAR = 3.0  # sqrt(KL) past which a run is in the table alone


def distance(row: dict[str, Any]) -> float:
    """sqrt(KL) from the start."""
    return math.sqrt(row["kl"])


def draw(found: dict[str, Any], folder: Path) -> None:
    """reward-hacking.svg and over-optimisation.svg in `folder`."""
    titles = (("gold", "gold, over sqrt(KL)"), ("proxy", "proxy: pays for length, over sqrt(KL)"), ("words", "words an answer, over sqrt(KL)"))
    charts = [(title, [curve(name, colour, [found[CHOSEN[0]][0], *(row for row in found[arm] if distance(row) <= FAR)], key) for name, arm, colour in ARMS]) for key, title in titles]
    by_n, by_beta = found[CHOSEN[0]], found["dpo, proxy"]
    pair = (("gold", 3), ("proxy", 2))
    charts.append(("best of n, over log2 n", [Curve(key, colour, [math.log2(row["n"]) for row in by_n], [row[key] for row in by_n]) for key, colour in pair]))
    at = [math.log10(row["beta"]) for row in by_beta]
    charts.append(("DPO on the proxy's pairs, over log10 beta", [Curve(key, colour, at, [row[key] for row in by_beta]) for key, colour in pair]))
    charts.append(("DPO on the proxy's pairs: words, over log10 beta", [Curve("words", 2, at, [row["words"] for row in by_beta])]))
    (folder / "reward-hacking.svg").write_text(sheet("A reward that pays for length, under best-of-n and DPO", charts))

    charts = []
    for arm, title in zip(CHOSEN, ("gain, chosen by the proxy, over sqrt(KL)", "gain, chosen by a reward model, over sqrt(KL)")):
        rows, fitted = found[arm], fit(found[arm])
        start, ds = rows[0], [distance(row) for row in rows]
        low, high = ([row["gold_interval"][i] - start["gold"] for row in rows] for i in (0, 1))
        gold = Curve("gold", 3, ds, [row["gold"] - start["gold"] for row in rows], low=low, high=high)
        paid = Curve("proxy", 2, ds, [row["proxy"] - start["proxy"] for row in rows])
        xs = [i * ds[-1] / 60 for i in range(61)]
        charts.append((title, [gold, paid, Curve("d (a - b d)", 4, xs, [fitted(x) for x in xs])]))
    (folder / "over-optimisation.svg").write_text(sheet("Gold and proxy over sqrt(KL): best of n", charts))


def curve(name: str, colour: int, rows: Rows, key: str) -> Curve:
    ordered = sorted(rows, key=distance)
    return Curve(name, colour, [distance(row) for row in ordered], [row[key] for row in ordered])


def fit(rows: Rows) -> Fitted:
    """gold(d) - gold(0) = d (alpha - beta d), over all n."""
    return fit_curve([row["kl"] for row in rows], [row["gold"] for row in rows])


def tables(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| | KL from the start, nats | words | proxy | gold (95 %) |", "|---|---|---|---|---|"]
    arms: Sequence[tuple[str, str, str]] = (
        ("best of n, proxy", "n", "best of {:g} by the proxy"),
        ("best of n, reward model", "n", "best of {:g} by a reward model"),
        ("dpo, proxy", "beta", "DPO, the proxy's pairs, beta {:g}"),
        ("dpo, gold", "beta", "DPO, gold's pairs, beta {:g}"),
    )
    for arm, key, label in arms:
        for row in found[arm]:
            low, high = row["gold_interval"]
            lines.append(f"| {label.format(row[key])} | {row['kl']:.2f} | {row['words']:.1f} | {row['proxy']:.3f} | {row['gold']:.3f} ({low:.3f} to {high:.3f}) |")
    for arm in CHOSEN:
        best, fitted = max(found[arm], key=lambda row: row["gold"]), fit(found[arm])
        turn = fitted.turning_point
        said = f"{turn:.2f} (KL {turn * turn:.2f})" if turn else "none"
        lines.append(f"\n{arm}: gold is highest at n = {best['n']}, sqrt(KL) {distance(best):.2f}; turning point of the fit: {said}, alpha {fitted.alpha:.3f}, beta {fitted.beta:.3f}, error {fitted.error:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit("start run.py")
