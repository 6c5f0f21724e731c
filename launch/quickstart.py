"""`make quickstart`: a MoE chat model in real 3D parallelism on this machine, killed half-way, resumed, asked, and given pairs.

Stages, each timed: train to the half and be killed with kill -9; resume and finish, answer held-out prompts; a reward model
learns from pairs of right answers and some that break the rules; the chat model learns from such pairs (DPO); check. Exit code 0
only if the resumed losses are bitwise those of the run before it was killed, every expert has work, and (on the built-in
dialogues) at least 80 % of the held-out prompts are answered word for word, 80 % of the held-out pairs are ranked as judged by
the reward model, and 90 % by the chat model after DPO.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from rich.console import Console

RUN, REWARDS, PAIRS = Path("runs/quickstart"), Path("runs/quickstart-rm"), Path("runs/quickstart-dpo")
OVERLAP = 10  # steps after the checkpoint that are done twice and compared
console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="train on this file instead of the built-in dialogues")
    parser.add_argument("overrides", nargs="*", help="changes to the recipe, e.g. train.max_steps=100")
    arguments = parser.parse_args()
    overrides = list(arguments.overrides)
    if arguments.data:
        overrides += [f"data.train={arguments.data}", "train.exact_match=false", "data.tokenizer.vocab_size=2048"]
    for run in (RUN, REWARDS, PAIRS):
        fresh_folder(run)
    stages = 3 if arguments.data else 5  # a file of yours holds dialogues; pairs of answers are another
    started = time.monotonic()
    seconds = {}
    memory = Memory()

    half = half_of(overrides)
    console.rule(f"1/{stages}  train with TP2 x PP2 x EP2 + SP on 4 local ranks; one is killed (kill -9) at step {half + OVERLAP}")
    before = train_and_kill(overrides, kill_at=half + OVERLAP)
    seconds["train and kill"] = time.monotonic() - started

    console.rule(f"2/{stages}  the same command continues from step {half}")
    begun = time.monotonic()
    if subprocess.run(command(overrides)).returncode:
        fail("the resumed run failed; its message is above")
    seconds["resume, finish, answer"] = time.monotonic() - begun

    if not arguments.data:
        console.rule(f"3/{stages}  a reward model, from the chat model, learns from pairs: right answers above those that break the rules")
        seconds["reward model"] = learn_from_pairs("rm train", "quickstart-rm", REWARDS)
        console.rule(f"4/{stages}  the chat model learns from pairs (DPO): its answers against others that break the rules")
        seconds["DPO"] = learn_from_pairs("dpo", "quickstart-dpo", PAIRS)

    console.rule(f"{stages}/{stages}  what came out")
    show(before, half, exact=not arguments.data)
    if not arguments.data:
        show_rewards()
        show_pairs()
    taken = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    installed = Path(sys.prefix) / ".ready"
    install = f"install {installed.read_text().strip()} s, " if installed.exists() and installed.read_text().strip() else ""
    console.print(f"\nstages: {install}{taken}; {time.monotonic() - started:.0f} s without install")
    console.print(f"memory: {memory.peak / 1e9:.1f} GB at most, all processes together")
    console.print(f"audit of the copies on the four ranks: {audited()}")
    console.print(f"\nreport: [bold]{(RUN / 'report.html').resolve()}[/]")
    if not arguments.data:
        console.print(f"reports of the reward model and of DPO: [bold]{(REWARDS / 'report.html').resolve()}[/], [bold]{(PAIRS / 'report.html').resolve()}[/]")
    console.print("\nnext:")
    megalign = Path(sys.executable).with_name("megalign")
    megalign = os.path.relpath(megalign) if megalign.is_relative_to(Path.cwd()) else str(megalign)
    for line, what in (
        (f"{megalign} chat {RUN}", "talk to it"),
        (f"{megalign} sft quickstart --dry-run", "what a recipe will do: parameters, memory, first row"),
        ("make quickstart DATA=your_chats.jsonl", "the same on your own conversations"),
    ):
        console.print(f"  {line:<45} {what}")


class Memory(threading.Thread):
    """Most memory that this process and all it started had at one moment, shared pages counted once (PSS), in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self) -> None:
        import psutil

        me = psutil.Process()
        while True:
            total = 0
            for process in [me, *me.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    info = process.memory_full_info()
                    total += getattr(info, "pss", info.uss)
            self.peak = max(self.peak, total)
            time.sleep(1)


def command(overrides: list[str]) -> list[str]:
    return [sys.executable, "-m", "megalign", "sft", "quickstart", f"output={RUN}", *overrides]


def learn_from_pairs(what: str, recipe: str, output: Path) -> float:
    """Run a recipe that starts from the chat model; return the seconds it took."""
    begun = time.monotonic()
    if subprocess.run([sys.executable, "-m", "megalign", *what.split(), recipe, f"model.init_from={RUN}", f"output={output}"]).returncode:
        fail(f"megalign {what} {recipe} failed; its message is above")
    return time.monotonic() - begun


def fresh_folder(run: Path) -> None:
    """Set an earlier quickstart aside: it is the user's, and this one must start from nothing."""
    if run.exists():
        number = 1
        while (aside := run.with_name(f"{run.name}.{number}")).exists():
            number += 1
        run.rename(aside)
        console.print(f"{run} exists from before; it is now {aside}")


def half_of(overrides: list[str]) -> int:
    """The step of the checkpoint that the run will be resumed from."""
    from megalign.config.load import load_recipe

    return int(load_recipe("quickstart", overrides).train.save_interval or 0)


def train_and_kill(overrides: list[str], kill_at: int) -> dict[int, tuple[float, float]]:
    """Run until step `kill_at`, kill one rank, wait for the end; return (loss, gradient norm) of each step so far."""
    process = subprocess.Popen(command(overrides))
    try:
        while process.poll() is None:
            if max(curve(), default=0) >= kill_at:
                os.kill(a_rank_of(process.pid), signal.SIGKILL)
                break
            time.sleep(0.1)
        code = process.wait(timeout=60)
    except BaseException:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        raise
    if code == 0 or max(curve(), default=0) < kill_at:
        fail("the first half did not get to its checkpoint; its message is above")
    return curve()


def a_rank_of(launcher: int) -> int:
    """Process id of the last rank that the launcher started."""
    import psutil

    ranks = [child for child in psutil.Process(launcher).children() if "megalign" in child.cmdline()]
    return max(ranks, key=lambda child: (child.create_time(), child.pid)).pid


def curve() -> dict[int, tuple[float, float]]:
    """(loss, gradient norm) by step, from metrics.jsonl as it is now."""
    found = {}
    path = RUN / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the line being written
        if row["kind"] == "train":
            found[row["step"]] = (row["loss"], row["grad_norm"])
    return found


def show(before: dict[int, tuple[float, float]], half: int, *, exact: bool) -> None:
    """Print and check what the run is proud of."""
    after = curve()
    twice = [step for step in before if step > half]
    if len(twice) < OVERLAP - 1 or any(before[step] != after[step] for step in twice):
        fail(f"losses of steps {half + 1} to {max(before)} differ between the killed and the resumed run")
    console.print(f"resumed exactly: steps {twice[0]} to {twice[-1]} were done twice, with bitwise the same loss and gradient norm")
    loads = [row["expert_load"] for row in map(json.loads, (RUN / "metrics.jsonl").read_text().splitlines()) if row.get("expert_load")]
    smallest = min(min(layer) for layer in loads[-1])
    console.print(f"experts: the least busy of {len(loads[-1])} x {len(loads[-1][0])} gets {smallest:.1%} of its layer's tokens")
    summary = json.loads((RUN / "summary.json").read_text())
    if exact:
        console.print(f"held-out prompts answered word for word: [bold]{summary['exact_match']:.0%}[/]")
    samples = RUN / "samples.jsonl"
    for line in samples.read_text().splitlines()[:3] if samples.exists() else []:
        sample = json.loads(line)
        console.print()
        for message in sample["prompt"]:
            console.print(f"  {message['role']:>9}: {message['content'][:300]}", markup=False)
        console.print(f"      [green]model:[/] [bold]{sample['response'][:300]}[/]")
    if exact and summary["exact_match"] < 0.8:
        fail(f"exact match is {summary['exact_match']:.0%}, below 80 %")
    if exact and smallest < 0.03:
        fail(f"an expert gets {smallest:.1%} of the tokens, below 3 %")


def show_rewards() -> None:
    """Print and check how the reward model ranks held-out pairs."""
    found = json.loads((REWARDS / "rewards.json").read_text())["heads"]["reward"]["held_out"]
    low, high = found["accuracy_interval"]
    console.print(
        f"\nreward model: [bold]{found['accuracy']:.0%}[/] of {found['pairs']} held-out pairs ranked as judged (95 %: {low:.0%} to {high:.0%}); "
        f"always the longer answer: {found['length_only_accuracy']:.0%}"
    )
    if found["accuracy"] < 0.8:
        fail(f"the reward model ranks {found['accuracy']:.0%} of the held-out pairs as judged, below 80 %")


def show_pairs() -> None:
    """Print and check what the pairs have taught, on held-out ones."""
    rows = [json.loads(line) for line in (PAIRS / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "eval"][-1]
    steps = max(row["step"] for row in rows if row["kind"] == "train")
    console.print(
        f"\nheld-out pairs after {steps} steps of DPO: [bold]{last['eval_rewards/accuracies']:.0%}[/] ranked as judged; "
        f"loss {last['eval_loss']:.3f}, from 0.693 at the reference"
    )
    for line in (PAIRS / "samples.jsonl").read_text().splitlines():
        pair = json.loads(line)
        if "chosen" in pair:
            console.print(f"\n       user: {pair['prompt'][-1]['content'][:300]}", markup=False)
            for side in ("chosen", "rejected"):
                console.print(f"  {side:>9}: {pair[side]['text'][:300]}  (reward {pair[side]['reward']:+.2f})", markup=False)
    if last["eval_rewards/accuracies"] < 0.9:
        fail(f"{last['eval_rewards/accuracies']:.0%} of the held-out pairs are ranked as judged, below 90 %")


def audited() -> str:
    """What the auditor said at the end: how many parameters, groups of ranks that hold copies, copies that differ."""
    rows = map(json.loads, (RUN / "metrics.jsonl").read_text().splitlines())
    found = [row["message"] for row in rows if row.get("event") == "audit"]
    if not found or not found[-1].endswith(", 0 drift"):
        fail(f"copies of parameters differ: {found[-1] if found else 'no audit'}; the run's events say which")
    return found[-1]


def fail(reason: str) -> None:
    console.print(f"\n[red]quickstart failed:[/] {reason}")
    raise SystemExit(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        console.print("\nstopped; run it again to start over")
        raise SystemExit(130) from None
