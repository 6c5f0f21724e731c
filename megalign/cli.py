"""The command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

import megalign
from megalign.cli_data import FormatOption, Overrides, data_app, recipes_app
from megalign.start import is_expected, run_ranks, sweep, train

app = typer.Typer(
    name="megalign",
    help="An end-to-end alignment stack for dialogue models: real tensor, pipeline and expert parallelism, laptop to cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
rm_app = typer.Typer(help="Reward models: train, score answers, look for what they reward by mistake.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(recipes_app, name="recipes")
app.add_typer(rm_app, name="rm")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe that comes with megalign.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print parameters, memory, steps and the first row; load no weights.")]


def main() -> None:
    """Entry point: run a command, turn expected errors into one clear message and exit code 1."""
    if "MEGALIGN_LAUNCHER_PID" in os.environ and "RANK" in os.environ:
        from megalign.parallel.local import end_with_launcher

        end_with_launcher()
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    try:
        app()
    except Exception as error:
        from megalign.parallel.local import record_failure

        record_failure(error, expected=is_expected(error))
        # A rank must not wait for neighbours that may wait for it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


@app.command()
def sft(recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Fine-tune on conversations; bare, it starts the local ranks that the layout needs."""
    train("sft", recipe, overrides or [], dry_run)


@app.command()
def pretrain(recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train on plain text: the same loop, every token scored."""
    train("pretrain", recipe, ["data.loss_on=all", *(overrides or [])], dry_run)


@app.command()
def dpo(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    betas: Annotated[str | None, typer.Option(help="A sweep: a run for each, e.g. 0.05,0.1,0.3,1, and a table and picture of what they did.")] = None,
) -> None:
    """Learn from pairs of answers: DPO and its family (dpo.loss); from pairs of its own answers, in rounds (rounds.count)."""
    if betas is None or dry_run:
        train("dpo", recipe, overrides or [], dry_run)
    else:
        sweep(recipe, overrides or [], betas)


@rm_app.command("train")
def rmtrain(recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Learn what is preferred, and what users do next, from pairs and labels (rm.heads)."""
    train("rm", recipe, overrides or [], dry_run)


@rm_app.command("score")
def rm_score(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run of rm train, or one of its checkpoints.", show_default=False)],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Answers to score: pairs, dialogues, rankings, labelled answers.", show_default=False)],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="A JSON line an answer; default: stdout.")] = None,
    ensemble: Annotated[list[Path] | None, typer.Option("--with", metavar="CHECKPOINT", help="Another member of an ensemble; may be repeated.")] = None,
    alpha: Annotated[float, typer.Option(help="Of an ensemble: pessimistic = mean - alpha * std.")] = 1.0,
    format: FormatOption = "auto",
) -> None:
    """Score every answer of a file. One process unless overrides ask for a layout."""
    from megalign.serving import chat_ranks

    def work(world: Any) -> None:
        from megalign.scoring import score_file

        score_file([checkpoint, *(ensemble or [])], file, overrides or [], world, output=output, format=format, alpha=alpha)

    run_ranks(chat_ranks(checkpoint, overrides or []), Path(tempfile.gettempdir()) / "megalign-score", work)


@rm_app.command("audit")
def rm_audit(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run of rm train, or one of its checkpoints.", show_default=False)],
    file: Annotated[str | None, typer.Argument(metavar="[FILE]", help="Pairs, labelled answers or rankings; default: what the run was validated on.", show_default=False)] = None,
    overrides: Overrides = None,
    head: Annotated[str | None, typer.Option(help="Default: the first.")] = None,
    rows: Annotated[int, typer.Option(min=20, help="Answers that are probed.")] = 200,
    output: Annotated[Path | None, typer.Option(help="JSON with all numbers.")] = None,
    policy: Annotated[Path | None, typer.Option(metavar="SAMPLES", help="What the current policy says, judged or not: have rewards moved, do chances still hold?")] = None,
) -> None:
    """Look for what a reward model rewards by mistake: length, format, flattery, hedging, who the user is; exit code 1 if it does."""
    from megalign.serving import chat_ranks

    given = [*([file] if file and "=" in file else []), *(overrides or [])]

    def work(world: Any) -> None:
        from megalign.reward_audit import audit_rewards

        audit_rewards(checkpoint, Path(file) if file and "=" not in file else None, given, world, head=head, rows=rows, output=output, policy=policy)

    run_ranks(chat_ranks(checkpoint, given), Path(tempfile.gettempdir()) / "megalign-score", work)


@rm_app.command("split")
def rm_split(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Rows with `user` and `time`.", show_default=False)],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Gets train.jsonl and validation.jsonl.", show_default=False)],
    share: Annotated[float, typer.Option(help="Of the users, held out.")] = 0.2,
    cut: Annotated[str | None, typer.Option(help="Seconds since 1970, or a date; default: after a share 1 - SHARE of the rows.")] = None,
    horizon: Annotated[float, typer.Option(help="Days after a row until its labels are known; training rows end that long before the cut.")] = 0.0,
    seed: int = 0,
) -> None:
    """Split labelled rows by users and time: validation has other users, and later."""
    from megalign.data.user_split import described, split_file

    print(described(split_file(file, folder, share=share, cut=cut, horizon_days=horizon, seed=seed)))


@app.command()
def kto(recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Learn from single answers that are labelled desirable or not (kto.loss)."""
    train("kto", recipe, overrides or [], dry_run)


@app.command("best-of-n")
def best_of_n(recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Draw n answers to each prompt, imitate the best, and again (best_of_n.scorer)."""
    train("best-of-n", recipe, overrides or [], dry_run)


@app.command()
def rso(recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Make pairs for dpo from a model's answers by statistical rejection sampling (rso.scorer)."""
    train("rso", recipe, overrides or [], dry_run)


@app.command()
def distill(recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Teach a model what a larger one says of the next token, or its answers (distill.teacher)."""
    train("distill", recipe, overrides or [], dry_run)


@app.command()
def validate(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check a recipe and its layout; print it with every default filled in."""
    from megalign.config.advice import warnings as advice
    from megalign.config.load import dump_recipe, load_recipe
    from megalign.config.rules import check

    loaded = load_recipe(recipe, overrides or [])
    check(loaded)
    print(dump_recipe(loaded), end="")
    for line in advice(loaded):
        print(f"warning: {line}", file=sys.stderr)


@app.command()
def plan(
    what: Annotated[str, typer.Argument(metavar="MODEL_OR_RECIPE", help="A preset (llama3-8b), a Hugging Face folder, or a recipe.", show_default=False)],
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="List the layouts of so many devices that fit, fastest first.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Kind of device, e.g. h100-80gb; cpu: this machine, measured.")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=8, help="Tokens of a row.")] = None,
    algorithm: Annotated[str, typer.Option(help="sft, dpo, ppo or grpo: which models are in memory.")] = "sft",
    reward_model: Annotated[bool, typer.Option("--reward-model", help="grpo: rewards come from a model, not from a verifier.")] = False,
    top: Annotated[int, typer.Option(min=1, help="How many layouts.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Numbers, for other programs.")] = False,
) -> None:
    """Parameters, memory, communication and step time before anything is loaded; with --gpus, which layout to take."""
    from megalign.planner import plan as print_plan

    print_plan(
        what,
        overrides or [],
        gpus=gpus,
        gpu=gpu,
        sequence_length=sequence_length,
        algorithm=algorithm,
        reward_model=reward_model,
        top=top,
        as_json=as_json,
    )


@app.command()
def chat(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run folder, or one of its checkpoints.", show_default=False)],
    overrides: Overrides = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this and end.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(help="0: always the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    max_new_tokens: Annotated[int, typer.Option()] = 256,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Talk to a checkpoint. One process unless overrides ask for a layout, e.g. parallel.tensor_model_parallel_size=2."""
    from megalign.serving import chat_with

    def work(world: Any) -> None:
        chat_with(checkpoint, overrides or [], world, prompt=prompt, system=system, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)

    from megalign.serving import chat_ranks

    run_ranks(chat_ranks(checkpoint, overrides or []), Path(tempfile.gettempdir()) / "megalign-chat", work)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run folder, or one of its checkpoints.", show_default=False)],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Hugging Face folder to write.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    ema: Annotated[bool | None, typer.Option(help="The weights averaged by train.ema_decay, or those trained last.  [default: those evaluated]")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Of a LoRA run: the adapters alone, as a PEFT folder; else they are merged into their base.")] = False,
    base: Annotated[str | None, typer.Option(help="Of a LoRA run: folder of its base, if it has moved.")] = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder (safetensors, config, tokenizer)."""
    from megalign.serving import write_hugging_face

    run_ranks(1, Path("."), lambda world: write_hugging_face(checkpoint, folder.resolve(), dtype, world, ema, adapter=adapter, base=base))


@app.command()
def average(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder for the averaged checkpoint.", show_default=False)],
    last: Annotated[int, typer.Option(min=2, help="How many of the newest checkpoints.")] = 2,
) -> None:
    """Average the weights of a run's last checkpoints (LAWA); chat and convert take the result."""
    from megalign.average import average as work

    run_ranks(1, Path("."), lambda world: print(work(run, output, last, world)))


@app.command()
def audit(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps on random tokens, compared at each.")] = 3,
    probe: Annotated[bool, typer.Option(help="Hold gradients against differences of the loss, in FP64.")] = True,
) -> None:
    """Check that copies of parameters are reduced as they must be on a recipe's layout; exit code 1 if not."""
    from megalign.config.layout import world_size_of
    from megalign.config.load import load_recipe
    from megalign.config.rules import check

    loaded = load_recipe(recipe, overrides or [])
    ranks = world_size_of(loaded)
    check(loaded, ranks)

    def work(world: Any) -> None:
        from megalign.audit import audit as run

        run(loaded, world, steps=steps, probe=probe)

    run_ranks(ranks, Path(tempfile.gettempdir()) / "megalign-audit", work)


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where runs will be written; on a cluster, a folder all nodes share.")] = Path("."),
    ranks: Annotated[int, typer.Option(min=1, help="Local ranks to start; not used inside torchrun, srun or mpirun.")] = 2,
    min_free_gb: Annotated[float, typer.Option(help="Less free space than this is an error.")] = 5.0,
) -> None:
    """Is this machine or cluster fit for a run? A table with verdicts and fixes; exit code 1 if something is broken."""
    from megalign.doctor import examine_alone, show
    from megalign.doctor.findings import worst
    from megalign.doctor.world import examine_as_rank
    from megalign.parallel.init import in_distributed_launch

    if in_distributed_launch():
        raise SystemExit(examine_as_rank(folder, min_free_gb=min_free_gb))
    findings = examine_alone(folder, ranks, min_free_gb=min_free_gb)
    show(findings)
    raise SystemExit(int(worst(findings) == "broken"))


@app.command()
def kernels(
    shapes: Annotated[list[str] | None, typer.Argument(metavar="[TOKENSxOUTxIN]...", help="Linear layers, e.g. 8192x4096x7168.")] = None,
    backend: Annotated[str | None, typer.Option(help="As if this rung were forced: auto, reference, triton, scaled_mm or gluon.")] = None,
    recipe: Annotated[str | None, typer.Option(metavar="RECIPE", help="Take kernels.fp8_backend of this recipe.")] = None,
) -> None:
    """Which FP8 backends this machine has, and which one each shape takes; on CUDA, new shapes are measured."""
    import torch

    from megalign.config.load import load_recipe
    from megalign.kernels import backends, overview

    backends.use(backend or (load_recipe(recipe, []).kernels.fp8_backend if recipe else None))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    asked = [overview.parse_shape(shape) for shape in shapes or []]
    print("\n".join(overview.overview(asked or list(overview.SHAPES), device)))


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.", show_default=False)]) -> None:
    """Build report.html of a run again."""
    from megalign.report.build import build_report

    print(build_report(run))


def _version(asked: bool) -> None:
    if asked:
        print(megalign.__version__)
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass
