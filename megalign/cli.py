"""The command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import errno
import gc
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import megalign

if TYPE_CHECKING:
    from megalign.config.schema import Recipe

app = typer.Typer(
    name="megalign",
    help="An end-to-end alignment stack for dialogue models: real tensor, pipeline and expert parallelism, laptop to cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at training data as the model will see it.", no_args_is_help=True)
recipes_app = typer.Typer(help="The recipes that come with megalign.", no_args_is_help=True)
rm_app = typer.Typer(help="Reward models: train, score answers, look for what they reward by mistake.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(recipes_app, name="recipes")
app.add_typer(rm_app, name="rm")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe that comes with megalign.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, e.g. optimizer.lr=1e-4")]
DataFiles = Annotated[list[Path], typer.Argument(metavar="FILES", help="Data files, or folders of data sets (of `datasets` or the hub).", show_default=False)]
FormatOption = Annotated[str, typer.Option(help="Format of the rows; auto: told by the first of a file.")]
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

        record_failure(error, expected=_is_expected(error))
        # A rank must not wait for neighbours that may wait for it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


@app.command()
def sft(recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Fine-tune on conversations; bare, it starts the local ranks that the layout needs."""
    _train("sft", recipe, overrides or [], dry_run)


@app.command()
def pretrain(recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train on plain text: the same loop, every token scored."""
    _train("pretrain", recipe, ["data.loss_on=all", *(overrides or [])], dry_run)


@app.command()
def dpo(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    betas: Annotated[str | None, typer.Option(help="A sweep: a run for each, e.g. 0.05,0.1,0.3,1, and a table and picture of what they did.")] = None,
) -> None:
    """Learn from pairs of answers: DPO and its family (dpo.loss); from pairs of its own answers, in rounds (rounds.count)."""
    if betas is None or dry_run:
        _train("dpo", recipe, overrides or [], dry_run)
    else:
        _sweep(recipe, overrides or [], betas)


@rm_app.command("train")
def rm_train(recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Learn what is preferred, and what users do next, from pairs and labels (rm.heads)."""
    _train("rm", recipe, overrides or [], dry_run)


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

    _run_ranks(chat_ranks(checkpoint, overrides or []), Path(tempfile.gettempdir()) / "megalign-score", work)


@rm_app.command("audit")
def rm_audit(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run of rm train, or one of its checkpoints.", show_default=False)],
    file: Annotated[str | None, typer.Argument(metavar="[FILE]", help="Pairs, labelled answers or rankings; default: what the run was validated on.", show_default=False)] = None,
    overrides: Overrides = None,
    head: Annotated[str | None, typer.Option(help="Default: the first.")] = None,
    rows: Annotated[int, typer.Option(min=20, help="Answers that are probed.")] = 200,
    output: Annotated[Path | None, typer.Option(help="JSON with all numbers.")] = None,
) -> None:
    """Look for what a reward model rewards by mistake: length, format, flattery, hedging, who the user is; exit code 1 if it does."""
    from megalign.serving import chat_ranks

    given = [*([file] if file and "=" in file else []), *(overrides or [])]

    def work(world: Any) -> None:
        from megalign.reward_audit import audit_rewards

        audit_rewards(checkpoint, Path(file) if file and "=" not in file else None, given, world, head=head, rows=rows, output=output)

    _run_ranks(chat_ranks(checkpoint, given), Path(tempfile.gettempdir()) / "megalign-score", work)


@app.command()
def kto(recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Learn from single answers that are labelled desirable or not (kto.loss)."""
    _train("kto", recipe, overrides or [], dry_run)


@app.command("best-of-n")
def best_of_n(recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Draw n answers to each prompt, imitate the best, and again (best_of_n.scorer)."""
    _train("best-of-n", recipe, overrides or [], dry_run)


@app.command()
def rso(recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Make pairs for dpo from a model's answers by statistical rejection sampling (rso.scorer)."""
    _train("rso", recipe, overrides or [], dry_run)


@app.command()
def distill(recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Teach a model what a larger one says of the next token, or its answers (distill.teacher)."""
    _train("distill", recipe, overrides or [], dry_run)


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

    _run_ranks(chat_ranks(checkpoint, overrides or []), Path(tempfile.gettempdir()) / "megalign-chat", work)


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

    _run_ranks(1, Path("."), lambda world: write_hugging_face(checkpoint, folder.resolve(), dtype, world, ema, adapter=adapter, base=base))


@app.command()
def average(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder for the averaged checkpoint.", show_default=False)],
    last: Annotated[int, typer.Option(min=2, help="How many of the newest checkpoints.")] = 2,
) -> None:
    """Average the weights of a run's last checkpoints (LAWA); chat and convert take the result."""
    from megalign.average import average as work

    _run_ranks(1, Path("."), lambda world: print(work(run, output, last, world)))


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

    _run_ranks(ranks, Path(tempfile.gettempdir()) / "megalign-audit", work)


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


@data_app.command("preview")
def data_preview(
    what: Annotated[str, typer.Argument(metavar="RECIPE_OR_FILE", help="A recipe, or a data file.", show_default=False)],
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    format: FormatOption = "auto",
) -> None:
    """Show rendered rows with the scored tokens coloured."""
    from megalign.config.load import load_recipe
    from megalign.config.schema import Recipe
    from megalign.data.kinds import is_data
    from megalign.data.preview import preview

    given = overrides or []
    if format != "auto":
        given = [f"data.format={format}", *given]
    if is_data(Path(what)):
        from megalign.config.load import apply_overrides

        recipe = apply_overrides(Recipe(), [f"data.train={what}", "data.validation_rows=0", "data.max_bad_share=1", *given])
    else:
        recipe = load_recipe(what, given)
    preview(recipe, rows)


@data_app.command("stats")
def data_stats(files: DataFiles, format: FormatOption = "auto") -> None:
    """Count the rows of files: what each becomes, and why some are unusable."""
    from megalign.data.statistics import statistics

    for file in files:
        statistics(file, format)


@data_app.command("tokenizer")
def data_tokenizer(
    files: DataFiles,
    output: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    vocab_size: Annotated[int, typer.Option(min=260, help="Special tokens included.")] = 4096,
    template: Annotated[str, typer.Option(help="Chat template whose control tokens it gets.")] = "chatml",
    format: FormatOption = "auto",
    special_token: Annotated[list[str] | None, typer.Option(help="A single id, e.g. <think>; may be repeated.")] = None,
) -> None:
    """Train a byte-level BPE tokenizer on files; print the bytes a token stands for in text it has not seen."""
    from megalign.data.statistics import tokenizer_from

    tokenizer_from(files, output, vocab_size, template, format, special_token or [])


@data_app.command("cache")
def data_cache(
    folder: Annotated[Path, typer.Argument(help="data.cache_dir, or the .cache beside run folders.", show_default=False)],
    prune: Annotated[str | None, typer.Option(metavar="SIZE", help="Remove the longest unused entries until at most this is left, e.g. 20GB.")] = None,
    unused_hours: Annotated[float, typer.Option(min=0, help="Keep what was used within so many hours: a run may be using it.")] = 24.0,
) -> None:
    """List the tokenised data of a cache, or remove what has not been used for longest; a run makes again what it misses."""
    from megalign.data.prune import show

    show(folder, prune, unused_hours)


@recipes_app.command("list")
def recipes_list() -> None:
    """Names and first lines."""
    from megalign.config.load import RECIPES, list_recipes

    for name in list_recipes():
        first = (RECIPES / f"{name}.yaml").read_text().splitlines()[0].lstrip("# ")
        print(f"{name:24} {first}")


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One that `megalign recipes list` names.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="File to write.", show_default=False)],
) -> None:
    """Copy a recipe to change it."""
    from megalign.config.load import find_recipe

    if target.exists():
        raise typer.BadParameter(f"{target} exists; choose another name")
    target.write_text(find_recipe(name).read_text())


def _version(asked: bool) -> None:
    if asked:
        print(megalign.__version__)
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


def _train(command: str, name: str, overrides: list[str], dry_run: bool) -> None:
    from megalign.config.load import load_recipe

    recipe = load_recipe(name, overrides)
    if dry_run:
        from megalign.dry_run import dry_run as print_plan

        print_plan(recipe, command=command)
        return
    # torch and megatron-core make a million objects as they are imported, and no garbage: looking for it takes a fifth of the time.
    gc.disable()
    try:
        _start(command, recipe)
    finally:
        gc.enable()


def _sweep(name: str, overrides: list[str], betas: str) -> None:
    from megalign.config.layout import world_size_of
    from megalign.config.load import load_recipe
    from megalign.config.rules import check

    try:
        values = [float(beta) for beta in betas.split(",")]
    except ValueError:
        values = []
    if not values or min(values) <= 0:
        raise typer.BadParameter(f"{betas!r} is no list of numbers above 0; e.g. 0.05,0.1,0.3,1", param_hint="--betas")
    recipe = _resolved(load_recipe(name, overrides))
    ranks = world_size_of(recipe)
    check(recipe, ranks)

    def work(world: Any) -> None:
        from megalign.sweep import sweep

        sweep(recipe, values, world)

    _run_ranks(ranks, Path(recipe.output), work)


def _resolved(recipe: Recipe) -> Recipe:
    """With the shape of what it starts from: how many ranks a layout needs depends on whether there are experts."""
    if recipe.model.init_from is None or not Path(recipe.model.init_from).is_dir():
        return recipe
    from megalign.models.resolve import resolve_model

    return resolve_model(recipe)


def _start(command: str, recipe: Recipe) -> None:
    from megalign.config.errors import ConfigError, Problem
    from megalign.config.layout import world_size_of
    from megalign.config.rules import check
    from megalign.parallel.init import in_distributed_launch

    recipe = _resolved(recipe)
    ranks = world_size_of(recipe)
    if not in_distributed_launch():
        check(recipe, ranks)
        try:
            Path(recipe.output).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError([Problem("output", f"this folder cannot be made ({error.strerror})", "choose another", recipe.output)]) from None

    def work(world: Any) -> None:
        if command == "dpo" and recipe.rounds.count is not None:
            from megalign.rounds import dpo_rounds as run
        elif command == "dpo":
            from megalign.dpo import dpo as run
        elif command == "kto":
            from megalign.kto import kto as run
        elif command == "best-of-n":
            from megalign.best_of_n import best_of_n as run
        elif command == "rso":
            from megalign.rso import rso as run
        elif command == "rm":
            from megalign.rm import rm as run
        elif command == "distill":
            from megalign.distill import distill as run
        else:
            from megalign.sft import sft as run
        gc.freeze()  # what was imported stays: the collector need not look through it again
        gc.enable()
        run(recipe, world)

    _run_ranks(ranks, Path(recipe.output), work)


def _run_ranks(ranks: int, folder: Path, work: Callable[[Any], None]) -> None:
    """Do `work` as a rank of the world that started us, or start the world on this machine."""
    from megalign.parallel.init import in_distributed_launch

    if not in_distributed_launch() and ranks > 1:
        from megalign.parallel.local import launch

        raise SystemExit(launch(sys.argv[1:], ranks, folder / "logs"))
    from megalign.parallel.init import init, shutdown
    from megalign.parallel.preempt import PREEMPTED, Preempted, leave_marker

    world = init()
    try:
        work(world)
    except Preempted as stop:
        leave_marker(stop)
        if world.rank == 0:
            print(f"\n{stop}", file=sys.stderr)
        shutdown()
        raise SystemExit(PREEMPTED) from None
    except KeyboardInterrupt:
        print("\nstopped. A training run continues from the last complete checkpoint when repeated.", file=sys.stderr)
        raise SystemExit(130) from None
    shutdown()


def _is_expected(error: BaseException) -> bool:
    """True if the message is all a user needs: no traceback."""
    names = {"ConfigError", "DataError", "RunError", "CheckpointError", "TrainingStopped", "TrackerError", "ConversionError", "PlacementError", "AuditFailed", "Fp8Error"}
    files = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
    full_or_broken = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
    return full_or_broken or isinstance(error, files) or any(kind.__name__ in names for kind in type(error).__mro__)
