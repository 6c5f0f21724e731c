"""The checks that mutations run with (reduction_mutants.py), on ranks: each returns what is wrong, nothing if all is well."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from cell_checks import SMOOTH, _forget, _parameters, gather_gradients, gradient_errors
from layout_checks import Run, microbatches
from reduction_mutants import MUTANTS, broken
from replica_checks import MOE, plain_moe
from replica_extras import DECLARED, add_extras, known_cuts

from megalign.parallel.placement import HOOK, NOBODY

EVERYTHING = {**MOE, "num_layers": 2, "share_embeddings_and_output_weights": True, "position_embedding_type": "learned_absolute", "max_position_embeddings": 64}
DENSE = {**EVERYTHING, "num_moe_experts": None, "moe_shared_expert_intermediate_size": None, "moe_aux_loss_coeff": 0.0}
_SMALL = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4}
BIASED = {
    **_SMALL, "normalization": "LayerNorm", "activation_func": "gelu_tanh", "gated_linear_unit": False, "add_bias_linear": True,
}  # fmt: skip
LATENT = {
    **_SMALL, "multi_latent_attention": True, "q_lora_rank": 24, "kv_lora_rank": 20, "qk_head_dim": 12, "qk_pos_emb_head_dim": 8, "v_head_dim": 10,
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # name: (model, parameters of a user's own)
    "everything": (EVERYTHING, tuple(DECLARED)),
    "four layers": ({**EVERYTHING, "num_layers": 4}, tuple(DECLARED)),
    "dense": (DENSE, tuple(kind for kind in DECLARED if "expert" not in kind)),
    "biased": (BIASED, ()),
    "latent": (LATENT, ()),
}
TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
BARE = dict(tensor_model_parallel_size=2)
PP2 = dict(pipeline_model_parallel_size=2)
# check: (model, layout, arguments of Run)
LAYOUTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tensor": ("everything", TP2, {}),
    "megatron's sums": ("everything", TP2, {"hooks": False}),
    "experts under tensor ranks": ("everything", {**TP2, "expert_model_parallel_size": 2}, {}),
    "cut experts": ("everything", {**TP2, "expert_tensor_parallel_size": 2}, {}),
    "no sequence": ("dense", BARE, {}),
    "stages": ("everything", PP2, {}),
    "virtual stages": ("four layers", {**PP2, "virtual_pipeline_model_parallel_size": 2}, {}),
    "stages, sharded optimizer": ("everything", PP2, {"distributed": True}),
    "biased": ("biased", TP2, {}),
    "latent": ("latent", BARE, {}),
    "data, overlap": ("dense", {}, {"overlap": True, "bucket_size": 2000}),
}


def _run(model: str, layout: dict[str, Any], **options: Any) -> Run:
    config, kinds = MODELS[model]
    known_cuts()

    def add(models: Any, grid: Any) -> None:
        add_extras(models, grid, kinds)
        for chunk in models:  # what a user's module left there says nothing beside a declaration
            for name, parameter in chunk.named_parameters():
                if name.endswith("head_scale"):
                    parameter.average_gradients_across_tp_domain = True

    return Run(config, layout, **{"distributed": False, "prepare": add, **SMOOTH, **options})


def oracle(model: str) -> list[dict[str, Any]]:
    """Two steps of one process: loss, norm, gradients."""
    run, steps = _run(model, {}), []
    for number in (1, 2):
        _take(run, number)
        loss = run.backward()
        gradients = {name: parameter.main_grad.clone() for name, parameter, _ in _parameters(run)}
        _, norm, _ = run.optimizer.step()
        steps.append({"loss": loss, "norm": float(norm), "gradients": gradients})
    _forget()
    return steps


def _take(run: Run, step: int) -> None:
    """Four microbatches in the first step, two in the second: what a hook learns in one must not bind it in the next."""
    everything = microbatches(6 - 2 * step)
    share = len(everything) // run.grid.data.size
    run.mine = everything[run.grid.data.rank * share : (run.grid.data.rank + 1) * share]


def oracles() -> bytes:
    """Of all models, on a world of one, pickled: tensors among the arguments of a process would travel as open files."""
    return pickle.dumps({model: oracle(model) for model in MODELS})


def layout(name: str, expected: dict[str, Any]) -> list[str]:
    """P13 and P5 over two steps, and that hooks send in backward."""
    model, sizes, options = LAYOUTS[name]
    run = _run(model, sizes, **options)
    late: list[str] = []
    for bucket in run.reduction.buckets:
        bucket.finish = partial(_finish, bucket, bucket.finish, late)
    wrong = [f"{p.name}: reduced by {p.reducers['tensor']}, and by megatron" for p in run.placements if _reduced_by_megatron(p)]
    for number, step in enumerate(expected[model], 1):
        _take(run, number)
        late.clear()  # the first step learns what a backward pass brings
        loss = run.backward()
        gather_gradients(run.chunks)
        errors = [(ratio, at) for at, ratio in gradient_errors(run, step["gradients"]) if not ratio <= 1]
        _, norm, _ = run.optimizer.step()
        wrong += [f"step {number}: gradient of {at} off by {ratio:.0f} tolerances" for ratio, at in sorted(errors, reverse=True)[:2]]
        wrong += [f"step {number}: {kind} off by {off:.0e}" for kind, off in (("loss", loss / step["loss"] - 1), ("norm", float(norm) / step["norm"] - 1)) if not abs(off) <= 1e-6]
    wrong += [f"{name} was reduced after backward, not in it" for name in late]
    return wrong


def _reduced_by_megatron(p: Any) -> bool:
    """Beside a hook, or where nothing is to be reduced."""
    flags = [getattr(p.parameter, flag, False) for flag in ("sequence_parallel", "average_gradients_across_tp_domain")]
    return any(flags) and p.reducers.get("tensor") in (HOOK, NOBODY)


def _finish(bucket: Any, finish: Callable[[], None], late: list[str]) -> None:
    if not bucket.done and bucket.flat is None:
        late += bucket.names[:1]
    finish()


def placed_again(expected: dict[str, Any]) -> list[str]:
    """Whoever places a placed model again (the probe's copy) finds the same."""
    from megalign.models.weights import named_parameters
    from megalign.parallel.placement import place

    run = _run("everything", TP2)
    named: Any = [(name, parameter) for name, parameter, _ in named_parameters(run.models, run.grid)]
    again = place(run.models, named, run.grid, hooks=True)
    return [f"{p.name}: {p.gradients}, then {q.gradients}" for p, q in zip(run.placements, again, strict=True) if (p.gradients, p.reducers) != (q.gradients, q.reducers)]


def plain(bf16: bool, expected: dict[str, Any]) -> list[str]:
    """P1 without DDP; of BF16 gradients, the bytes of FP32 messages."""
    found = plain_moe(True, {}, bf16)
    return [f"{key}: {found[key]}" for key, good in (("spread", 0), ("bytes", found["least"])) if found[key] != good]


def refused(case: str, expected: dict[str, Any]) -> list[str]:
    """A placement that is in doubt must not be let pass: the name must stand in the error."""
    from megalign.parallel.placement import PlacementError

    layout, prepare, name = REFUSED[case]
    try:
        Run(EVERYTHING if case == "expert flag" else DENSE, layout, distributed=False, prepare=prepare)
    except PlacementError as error:
        return [] if re.search(name, str(error)) else [f"refused, but not for {name}: {error}"]
    return [f"{name} was let pass"]


def _undeclared(kind: str) -> Callable[..., None]:
    return lambda models, grid: add_extras(models, grid, (kind,), {})


def _flag(pattern: str, **flags: Any) -> Callable[..., None]:
    def set_flags(models: Any, grid: Any) -> None:
        for chunk in models:
            for name, parameter in chunk.named_parameters():
                if re.search(pattern, name):
                    for flag, value in flags.items():
                        setattr(parameter, flag, value)

    return set_flags


def _head_norm(models: Any, grid: Any) -> None:
    from megalign.parallel.layers import RMSNorm

    for chunk in models:
        chunk.decoder.layers[0].self_attention.core_attention.out_norm = RMSNorm(chunk.config, chunk.config.kv_channels)


def _differently(models: Any, grid: Any) -> None:
    from megalign.parallel.placement import declare

    for name, parameter in models[0].named_parameters():
        if name.endswith("final_layernorm.weight"):
            declare(parameter, tensor="partial" if dist.get_rank() else "full")


def _by_name(models: Any, grid: Any) -> None:
    from megalign.parallel.placement import declare

    for name, parameter in models[0].named_parameters():
        if name.endswith("q_layernorm.weight"):
            declare(parameter, tensor="full")


REFUSED: dict[str, tuple[dict[str, Any], Callable[..., None], str]] = {
    "stages": (PP2, _undeclared("shared_scale"), "shared_scale"),
    "tensor": (TP2, _undeclared("table"), "table"),
    "expert flag": (TP2, _undeclared("expert_a"), "expert_a"),
    "not an expert": (BARE, _flag("final_layernorm", allreduce=False), "final_layernorm"),
    "head norm": (BARE, _head_norm, "out_norm"),
    "disagreement": (TP2, _differently, "final_layernorm"),
    "two reducers": (BARE, _by_name, "q_layernorm"),
}


def looked_at(expected: dict[str, Any]) -> list[str]:
    """Steps at which an auditor of interval 100 compares, in a run that begins at 37."""
    from megalign.parallel.audit.auditor import Auditor

    run = Run(DENSE, TP2, distributed=False)
    auditor = Auditor(run.grid, lambda: [], run.chunks, None, interval=100)
    auditor.started = 37
    due = [step for step in range(38, 301) if auditor.due(step)]
    return [] if due == [38, 100, 200, 300] else [f"looked at steps {due[:5]}"]


def check(name: str, expected: dict[str, Any]) -> list[str]:
    """Run a check by its key."""
    kind, _, case = name.partition(": ")
    if kind == "refused":
        return refused(case, expected)
    if kind in ("audit", "run", "probe"):
        import auditor_checks

        return getattr(auditor_checks, kind)(case)
    others = {"placed again": placed_again, "plain": partial(plain, False), "plain, bf16": partial(plain, True), "looked at": looked_at}
    return others[name](expected) if name in others else layout(name, expected)


def verdicts(names: list[str | None], checks: list[str], pickled: bytes) -> list[str]:
    """For each mutation (None: without one) with its check: what was found wrong first, or ""."""
    from megalign.parallel.audit.findings import Finding  # noqa: F401  (so that nothing is imported inside a mutation)

    torch.manual_seed(0)
    expected, found = pickle.loads(pickled), []
    for name, key in zip(names, checks, strict=True):
        try:
            if name is None:
                wrong = check(key, expected)
            else:
                with broken(MUTANTS[name]):
                    wrong = check(key, expected)
        except Exception as error:
            wrong = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, wrong)
        _forget()
        found.append(next((said[0] for said in everywhere if said), ""))
    return found
