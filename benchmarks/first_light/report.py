"""Compare a finished run with counting, and write the page about it.

    megalign sft roleplay-moe && python benchmarks/first_light/report.py runs/roleplay-moe

Fits unigram and Kneser-Ney bigram on the run's training rows with its tokenizer, scores them on the same assistant
tokens as the run's evaluation, and writes docs/first-light.md, docs/first-light.svg and
benchmarks/results/first_light.json. Exit code 1 unless the best checkpoint is at least 0.3 nat below the bigram.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from megalign.data.dataset import build_datasets
from megalign.report.svg import Curve, line_chart

ROOT = Path(__file__).parents[2]
MARGIN = 0.3  # nats
STYLE = """<style>
svg { font: 12px system-ui, sans-serif; background: #fff; } text { fill: #555; } path { fill: none; }
.grid, .axis { stroke: #e4e4df; } .reference { stroke: #999; stroke-dasharray: 4 3; } .end { text-anchor: end; }
.c1 { stroke: #2c5fc4; stroke-width: 1.5; } .c2 { stroke: #cc5a1e; stroke-width: 2; } circle.c2 { fill: #cc5a1e; }
.faint { opacity: .45; }
</style>"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run: Path = parser.parse_args().run
    summary, environment = (json.loads((run / name).read_text()) for name in ("summary.json", "environment.json"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    counting = baselines(run)
    result = {
        "command": "megalign sft roleplay-moe; python benchmarks/first_light/report.py runs/roleplay-moe",
        "environment": {key: environment[key] for key in ("cpu", "cores", "torch", "megatron_core", "python", "layout", "git")},
        "best_eval_loss": summary["best_eval_loss"],
        "best_step": summary["best_step"],
        "steps": summary["steps"],
        "wall_seconds": summary["wall_seconds"],
        "tokens": summary["tokens"],
        "parameters": summary["parameters"],
        "active_parameters": summary["active_parameters"],
        **counting,
        "below_bigram": counting["bigram"] - summary["best_eval_loss"],
        "smallest_expert_share": min(min(layer) for layer in [row["expert_load"] for row in train if row.get("expert_load")][-1]),
        "stopped_by": [row["message"] for row in rows if row["kind"] == "event" and row["event"] == "stop"],
    }
    (ROOT / "benchmarks" / "results" / "first_light.json").write_text(json.dumps(result, indent=1) + "\n")
    (ROOT / "docs" / "first-light.svg").write_text(curve(train, evaluations, counting))
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()][:3]
    (ROOT / "docs" / "first-light.md").write_text(page(result, evaluations, samples))
    print(json.dumps(result, indent=1))
    if result["below_bigram"] < MARGIN:
        raise SystemExit(f"the best checkpoint is {result['below_bigram']:.3f} nat below the bigram, less than {MARGIN}")


def baselines(run: Path) -> dict[str, float]:
    """Nats per scored validation token of counting."""
    spec = importlib.util.spec_from_file_location("kneser_ney", ROOT / "benchmarks" / "baselines" / "kneser_ney.py")
    assert spec is not None and spec.loader is not None
    kneser_ney: Any = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["kneser_ney"] = kneser_ney
    spec.loader.exec_module(kneser_ney)
    train, validation = build_datasets(kneser_ney.load(str(run)))
    fitted, scored = ([example for pack in dataset.rows for example in pack] for dataset in (train, validation))
    model = kneser_ney.fit(fitted, train.tokenizer.vocab_size)
    return {
        "unigram": kneser_ney.unigram_nll(model, scored),
        "bigram": kneser_ney.nll(model, scored),
        "scored_tokens": validation.statistics["scored_tokens"],
    }


def curve(train: list[dict], evaluations: list[dict], counting: dict[str, float]) -> str:
    """Training and evaluation loss over steps, with the two baselines."""
    chart = line_chart(
        "loss",
        [
            Curve("training loss", 1, [row["step"] for row in train], [row["loss"] for row in train], kind="faint"),
            Curve("evaluation loss", 2, [row["step"] for row in evaluations], [row["eval_loss"] for row in evaluations], kind="dots"),
        ],
        wide=True,
        lines=[(counting["unigram"], "unigram"), (counting["bigram"], "Kneser-Ney bigram")],
    )
    assert chart is not None
    drawing = str(chart.svg)
    head = drawing.index(">") + 1
    opening = drawing[:head]
    if "xmlns" not in opening:
        opening = opening.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return opening + STYLE + drawing[head:] + "\n"


def page(result: dict[str, Any], evaluations: list[dict], samples: list[dict]) -> str:
    """docs/first-light.md."""
    environment = result["environment"]
    layout = " ".join(f"{name.upper()}{size}" for name, size in environment["layout"].items() if size > 1)
    lines = [
        "# First light: a MoE chat model on 1,500 real dialogues, in 3D parallel, on two cores",
        "",
        "Written by `benchmarks/first_light/report.py` from the run folder; every number below is its output.",
        "",
        "```",
        "megalign sft roleplay-moe                                    # data: ../shared/data/roleplay/roleplay.json",
        "python benchmarks/first_light/report.py runs/roleplay-moe",
        "```",
        "",
        f"{result['parameters'] / 1e6:.2f}M parameters ({result['active_parameters'] / 1e6:.2f}M active), {layout} with sequence parallelism, "
        f"4 ranks on {environment['cores']} cores ({environment['cpu']}), torch {environment['torch']}, megatron-core {environment['megatron_core']}. "
        f"{result['steps']} steps, {result['tokens'] / 1e6:.2f}M tokens, {result['wall_seconds'] / 60:.1f} minutes of wall time, answers included"
        + (f"; {result['stopped_by'][-1]}." if result["stopped_by"] else "."),
        "",
        f"Nats per assistant token on the last 100 rows ({result['scored_tokens']:,} tokens), same tokenizer (4,096 ids), same tokens:",
        "",
        "| model | nats |",
        "|---|---|",
        f"| unigram | {result['unigram']:.3f} |",
        f"| Kneser-Ney bigram, fitted on the training rows | {result['bigram']:.3f} |",
        f"| **best checkpoint** (step {result['best_step']}) | **{result['best_eval_loss']:.3f}** |",
        "",
        f"The checkpoint is {result['below_bigram']:.3f} nat below the bigram (asked for: at least {MARGIN}). The least busy expert gets "
        f"{result['smallest_expert_share']:.1%} of its layer's tokens at the end.",
        "",
        "![loss over steps](first-light.svg)",
        "",
        "## Three samples of the best checkpoint",
        "",
        "Greedy, held-out prompts, the first three of the validation rows. At this size and with 300,000 tokens of data the text",
        "has the form of the data and little sense; the figures above say what was learnt.",
        "",
    ]
    for sample in samples:
        prompt = sample["prompt"][-1]["content"].replace("\n", " ")
        answer = sample["response"].replace("\n", " ")
        lines += [f"> **user:** {prompt}", ">", f"> **model:** {answer}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
