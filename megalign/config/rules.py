"""What no single key can decide: layouts, batches, and megatron-core's own rules, said before anything starts.

`check` runs every rule (those of the layout and of the model have their own files) and raises all violations at
once. What megatron gets silently wrong and no key controls, such as interleaved communication on gloo, is set by
the model builder and is no rule.
"""

from __future__ import annotations

from collections.abc import Iterator

from megalign.config import adapters, layout_rules, model_rules, preference, recompute, reward, teaching
from megalign.config.advice import warnings
from megalign.config.errors import ConfigError, Problem, not_a_multiple
from megalign.config.layout import Layout, layout_of, sequence_multiple, world_size_of
from megalign.config.schema import TEMPLATES, Recipe
from megalign.config.suggest import closest

__all__ = ["check", "warnings", "world_size_of"]


def check(recipe: Recipe, world_size: int | None = None) -> None:
    """Raise ConfigError with every violated rule, or return.

    world_size: ranks that were started; None: as many as the layout needs (`world_size_of`).
    """
    layout = layout_of(recipe, world_size)
    problems = [problem for rule in RULES for problem in rule(recipe, layout)]
    if problems:
        raise ConfigError(problems)


def check_vocabulary(recipe: Recipe, tokenizer_size: int) -> None:
    """Raise ConfigError where a tokenizer of `tokenizer_size` ids, known only once it is loaded or trained, does not
    fit `model.vocab_size`: the word embedding would be read past its end."""
    size = recipe.model.vocab_size
    if size is not None and size < tokenizer_size:
        fix = f"set it to null, or to {tokenizer_size} or more"
        raise ConfigError([Problem("model.vocab_size", f"the tokenizer has {tokenizer_size} ids", fix, size)])


def sequence_length(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """A row is cut evenly over context- and sequence-parallel ranks (see `layout.sequence_multiple`)."""
    length, sharded = recipe.data.sequence_length, recipe.parallel.sequence_parallel
    multiple = sequence_multiple(layout, sharded)
    if length % multiple:
        parts = [f"tp({layout.tp})"] if sharded else []
        parts += [f"2 * cp({layout.cp})"] if layout.cp > 1 else []
        what = f"{' * '.join(parts)} = {multiple}"
        yield not_a_multiple("data.sequence_length", length, multiple, what, "lower the parallel sizes")


def template(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """The chat template is a known one, a Jinja file, or that of a tokenizer that there is."""
    name, tokenizer = recipe.data.template, recipe.data.tokenizer.path or recipe.model.init_from
    if name == "tokenizer" and tokenizer is None:
        fix = f"give data.tokenizer.path, or choose one of {', '.join(TEMPLATES)}"
        yield Problem("data.template", "a tokenizer that is trained here has no template of its own", fix, name)
    elif name not in (*TEMPLATES, "tokenizer") and not name.endswith(".jinja"):
        near = closest(name, list(TEMPLATES)) or closest(name, [each.partition("-")[0] for each in TEMPLATES])
        fix = f"choose one of {', '.join(TEMPLATES)}, a .jinja file, or tokenizer (its own){near}"
        yield Problem("data.template", "no such chat template", fix, name)


def batch(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """Each data-parallel rank takes a whole number of microbatches a step."""
    micro, rows = recipe.train.micro_batch_size, recipe.train.global_batch_size
    product = micro * layout.dp
    if rows % product:
        sizes = f"micro_batch_size({micro}) * data parallel({layout.dp}) = {product}"
        other = "lower train.micro_batch_size" if micro > 1 else "start fewer data-parallel ranks"
        yield not_a_multiple("train.global_batch_size", rows, product, sizes, other)


def schedule(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """The learning rate rises, then falls, within the run; a key that the style ignores is a mistake."""
    optimizer, steps = recipe.optimizer, recipe.train.max_steps
    if steps is not None and optimizer.lr_warmup_steps >= steps:
        rule = f"the run has only train.max_steps({steps}), and the warmup would never end"
        fix = f"lower it, e.g. to {max(1, steps // 20)}" if steps > 1 else "set 0"
        yield Problem("optimizer.lr_warmup_steps", rule, fix, optimizer.lr_warmup_steps)
    if optimizer.min_lr > optimizer.lr:
        rule = f"is above the peak optimizer.lr({optimizer.lr:g})"
        yield Problem("optimizer.min_lr", rule, f"lower it, e.g. to {optimizer.lr / 10:g}", optimizer.min_lr)
    if optimizer.lr_num_cycles > 1 and optimizer.lr_decay_style != "cosine_with_restarts":
        rule = f"lr_decay_style {optimizer.lr_decay_style} has no cycles"
        fix = "set optimizer.lr_decay_style to cosine_with_restarts, or this to 1"
        yield Problem("optimizer.lr_num_cycles", rule, fix, optimizer.lr_num_cycles)
    yield from _warmup_stable_decay(recipe)


def _warmup_stable_decay(recipe: Recipe) -> Iterator[Problem]:
    optimizer, steps, decay = recipe.optimizer, recipe.train.max_steps, recipe.optimizer.lr_wsd_decay_steps
    if optimizer.lr_decay_style != "wsd":
        if decay is not None:
            rule = f"lr_decay_style {optimizer.lr_decay_style} has no decay phase of its own"
            yield Problem("optimizer.lr_wsd_decay_steps", rule, "set optimizer.lr_decay_style to wsd, or leave this out", decay)
        return
    if decay is None:
        rule, fix = "wsd decays over the last steps, and must be told how many", "give it; 10 to 20 % of the steps is usual"
        yield Problem("optimizer.lr_wsd_decay_steps", rule, fix, decay)
    elif steps is not None and optimizer.lr_warmup_steps + decay > steps:
        rule = f"with lr_warmup_steps({optimizer.lr_warmup_steps}) it is more than train.max_steps({steps})"
        yield Problem("optimizer.lr_wsd_decay_steps", rule, f"lower it, e.g. to {max(1, steps // 10)}", decay)


def evaluation(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """What needs evaluations, or rows to evaluate, says so before the training and not after it."""
    train, data = recipe.train, recipe.data
    if train.early_stop_patience is not None and train.eval_interval is None:
        rule, fix = "counts evaluations, but there is only one, at the end", "give train.eval_interval"
        yield Problem("train.early_stop_patience", rule, fix, train.early_stop_patience)
    if train.eval_ema and train.ema_decay is None:
        yield Problem("train.eval_ema", "no average is kept: ema_decay is null", "give train.ema_decay, or set it to false", True)
    if data.validation is None and data.validation_rows == 0:
        for key in ("eval_interval", "exact_match", "eval_prompts"):
            if value := getattr(train, key):
                fix = "give data.validation or data.validation_rows"
                yield Problem(f"train.{key}", "there are no validation rows", fix, value)


def profile(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """A profile has a first and a last step, in this order."""
    if recipe.logging.profile_steps is not None:
        first, last = recipe.logging.profile_steps
        if not 1 <= first <= last:
            rule = "must be [first, last] with 1 <= first <= last; steps count from 1"
            yield Problem("logging.profile_steps", rule, "e.g. [10, 12]", [first, last])


def sources(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """A mixture stands in the place of data.train; its curriculum speaks of its sources; a list of files is not empty."""
    data = recipe.data
    for key, files in (("train", data.train), ("validation", data.validation), *(("mixture", source.path) for source in data.mixture or [])):
        if files == []:
            yield Problem(f"data.{key}", "names no file", "give one, or several", files)
    if data.mixture is not None:
        names = [source.name for source in data.mixture]
        if len(set(names)) < len(names):
            yield Problem("data.mixture", "two sources have one name", "give each its own", names)
        if sum(source.weight for source in data.mixture) <= 0:
            yield Problem("data.mixture", "no source has a weight above 0", "give one", names)
        if data.train != type(data)().train:
            yield Problem("data.train", "data.mixture takes its place", "remove one of them, or add this file to the mixture", data.train)
    if data.curriculum is not None and data.mixture is None:
        yield Problem("data.curriculum", "changes the weights of data.mixture, and there is none", "give data.mixture, or remove it")
    elif data.curriculum is not None:
        names = [source.name for source in data.mixture or []]
        steps = [stage.from_step for stage in data.curriculum]
        if sorted(set(steps)) != steps:
            yield Problem("data.curriculum", "stages are not in the order of their steps", "sort them by from_step", steps)
        for stage in data.curriculum:
            unknown = sorted(set(stage.weights) - set(names))
            if unknown:
                yield Problem("data.curriculum", f"no source of data.mixture is called {unknown[0]!r}", f"known: {', '.join(names)}", unknown)
            if min(stage.weights.values(), default=0) < 0 or sum(stage.weights.values()) <= 0:
                yield Problem("data.curriculum", f"weights from step {stage.from_step} on do not make shares", "none below 0, one above", stage.weights)


def streaming(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """Nothing that needs the whole of the data before the first step."""
    data = recipe.data
    if not data.streaming:
        return
    if recipe.train.max_steps is None:
        yield Problem("train.max_steps", "data.streaming does not know how many rows there are", "give the number of steps")
    if data.tokenizer.path is None and recipe.model.init_from is None:
        yield Problem("data.tokenizer.path", "a tokenizer is trained on all rows, and data.streaming reads them while training", "give a tokenizer")
    if data.validation is None and data.validation_rows > 0:
        yield Problem("data.validation_rows", "data.streaming does not know the last rows", "give data.validation, or set this to 0", data.validation_rows)
    for key in ("mixture", "order_by_length"):
        if getattr(data, key):
            yield Problem(f"data.{key}", "needs all rows, and data.streaming has a window of them", "turn one of them off")


RULES = (
    *layout_rules.RULES,
    *model_rules.RULES,
    recompute.recompute,
    sequence_length,
    template,
    batch,
    schedule,
    evaluation,
    profile,
    sources,
    streaming,
    preference.preference,
    teaching.teaching,
    preference.rounds,
    adapters.adapters,
    reward.reward_heads,
    reward.judges,
)
