"""Mutations: one line of our reduction, its flags, or the auditor is taken out or turned round, and a check must notice.

A mutation is the text of a function with `old` replaced by `new`; the function gets the changed code in place, wherever it
has been imported. Each names the check that runs with it. Checks return what is wrong, nothing if all is well; without a
mutation all of them return nothing (test_mutants.py), with one each must return something, or the run must be refused.
"""

from __future__ import annotations
import __future__

import contextlib
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mutant:
    """where: "module:function" or "module:Class.method". check: a key of `mutant_checks.CHECKS`. world: ranks it runs on."""

    where: str
    old: str
    new: str
    check: str
    world: int = 2


PLACEMENT, REDUCTION, LAYERS = "megalign.parallel.placement", "megalign.parallel.reduction", "megalign.parallel.layers"
AUDIT, TRAINER = "megalign.parallel.audit", "megalign.trainer"
TELL, ATTACH, WRAP = f"{PLACEMENT}:_tell_megatron", f"{REDUCTION}:attach", "megalign.parallel.optimizer:wrap_data_parallel"

FLAGS = {
    "RMSNorm does not say that it sees this rank's tokens": Mutant(f"{LAYERS}:RMSNorm.__init__", "self.weight.sequence_parallel = config.sequence_parallel", "pass", "tensor"),
    "LayerNorm does not say that it sees this rank's tokens": Mutant(f"{LAYERS}:LayerNorm.__init__", "parameter.sequence_parallel = config.sequence_parallel", "pass", "biased"),
    "megatron is not told that a hook reduces": Mutant(TELL, "parameter.sequence_parallel = False", "pass", "tensor"),
    "megatron is not told that nothing is to be averaged": Mutant(TELL, "parameter.average_gradients_across_tp_domain = False", "pass", "tensor"),
    "a second placing forgets what the first one read": Mutant(TELL, 'parameter.placement = Declaration((), {"tensor": p.gradients["tensor"]})', "pass", "placed again"),
    "a declared expert parameter is not marked as an expert's": Mutant(TELL, "parameter.allreduce = False", "pass", "tensor"),
    "experts are not tagged where they are built": Mutant("megalign.models.build:_tag_experts", "parameter.allreduce = False", "pass", "tensor"),
    "a copied expert parameter is not in the norm of all ranks": Mutant(TELL, '        if "expert_tensor" not in p.shard:\n            parameter.tensor_model_parallel = True', '        if "expert_tensor" not in p.shard:\n            pass', "experts under tensor ranks"),
    "a copied expert parameter counts on every rank": Mutant(TELL, 'parameter.shared = getattr(parameter, "shared", False) or grid.expert_tensor.rank > 0', "pass", "cut experts"),
    "a cut parameter counts on one rank": Mutant(TELL, 'in p.shard or "expert_tensor" in p.shard:\n        parameter.tensor_model_parallel = True', 'in p.shard or "expert_tensor" in p.shard:\n        pass', "tensor"),
    "a stage's copy counts in the norm": Mutant(TELL, "parameter.shared = True  # the norm", "pass  # the norm", "stages"),
    "a second copy of a rank's virtual stages counts in the norm": Mutant(TELL, " or not first:", ":", "virtual stages"),
    "a stage's copy shares a bucket with its neighbours": Mutant(TELL, "parameter.shared_embedding = True", "pass", "stages, sharded optimizer", world=4),
}  # fmt: skip

HOOKS = {
    "no hook in backward: reduced after it": Mutant(f"{REDUCTION}:_attach_to", "accumulator.register_hook(_when_last(ddp_group, bucket, parameter))", "pass", "tensor"),
    "nothing is reduced before DDP sends its bucket": Mutant(f"{REDUCTION}:_attach_to", "ddp_group.start_grad_sync, ddp_group.reset = start_grad_sync, reset_both", "ddp_group.reset = reset_both", "tensor"),
    "buckets are not made ready for the next step": Mutant(f"{REDUCTION}:_attach_to", "ddp_group.start_grad_sync, ddp_group.reset = start_grad_sync, reset_both", "ddp_group.start_grad_sync = start_grad_sync", "tensor"),
    "the schedule is not told to mark the last microbatch": Mutant(ATTACH, "config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]", "pass", "tensor"),
    "copies on several stages are not added up": Mutant(ATTACH, "config.finalize_model_grads_func = finalize", "pass", "stages"),
    "megatron's finalisation is lost": Mutant(ATTACH, "megatrons(*args, **kwargs)", "pass", "stages"),
    "stages: the sum stays on the rank": Mutant(f"{REDUCTION}:Reduction.finish_stages", "dist.all_reduce(flat, group=group)", "pass", "stages"),
    "virtual stages: one copy instead of the sum": Mutant(f"{REDUCTION}:Reduction.finish_stages", ".sum(0) for copies", "[0] for copies", "virtual stages"),
    "megatron's finalisation is not asked for": Mutant(WRAP, "config.finalize_model_grads_func = finalize_model_grads", "pass", "megatron's sums"),
    "overlap: the schedule is not told to mark the last microbatch": Mutant(WRAP, "config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]", "pass", "data, overlap"),
    "every microbatch counts as the last": Mutant(f"{REDUCTION}:_when_last", "if not ddp_group.is_last_microbatch:", "if False:", "tensor"),
    "a mean stays a sum": Mutant(f"{REDUCTION}:Bucket.finish", "if self.mean:", "if False:", "no sequence"),
    "a sum becomes a mean": Mutant(f"{REDUCTION}:Bucket.finish", "if self.mean:", "if True:", "tensor"),
    "what the ranks added up is not written back": Mutant(f"{REDUCTION}:Bucket.finish", "gradient.copy_(total.view_as(parameter))", "pass", "tensor"),
    "buckets send nothing": Mutant(f"{REDUCTION}:Bucket.send", "self.work = dist.all_reduce(self.flat, group=self.group, async_op=True)", "self.work = dist.all_reduce(self.flat.clone(), group=self.group, async_op=True)", "tensor"),
    "expert-tensor copies have no bucket": Mutant(ATTACH, 'for axis in ("tensor", "expert_tensor")', 'for axis in ("tensor",)', "cut experts"),
    "experts' buckets of DDP are passed over": Mutant(ATTACH, "chunk.bucket_groups + chunk.expert_parallel_bucket_groups", "chunk.bucket_groups", "cut experts"),
    "plain module: no hook": Mutant(f"{REDUCTION}:PlainReduction.__init__", "self.handles.append(parameter.register_post_accumulate_grad_hook(self._hook(bucket)))", "pass", "plain"),
    "plain module: backward does not wait": Mutant(f"{REDUCTION}:PlainReduction._hook", "torch.autograd.Variable._execution_engine.queue_callback(self._finish)", "pass", "plain"),
    "plain module: every microbatch is sent": Mutant(f"{REDUCTION}:PlainReduction._hook", "if not self.synchronise:", "if False:", "plain"),
    "plain module: messages in the gradients' precision": Mutant(f"{REDUCTION}:Bucket.send", "if self.dtype is not None:", "if False:", "plain, bf16"),
    "MLA's rotary key is not summed": Mutant(f"{LAYERS}:sum_rotary_key_gradients", "module.linear_kv_down_proj.register_forward_hook(hook)", "pass", "latent"),
    "a hooked parameter has no reducer": Mutant(f"{PLACEMENT}:_with_reducers", "reducers[axis] = HOOK", "reducers[axis] = NOBODY", "tensor"),
    "a stage's copy has no reducer": Mutant(f"{PLACEMENT}:_with_reducers", "reducers[axis] = FINAL_HOOK if p.stages else EMBEDDING", "reducers[axis] = EMBEDDING", "stages"),
    "megatron and the hook both sum": Mutant(f"{PLACEMENT}:_with_reducers", "reducers[axis] = TENSOR_SUM\n        elif axis == \"tensor\" and gradient == \"partial\" and sums", "reducers[axis] = HOOK\n        elif axis == \"tensor\" and gradient == \"partial\" and sums", "tensor"),
    "under sequence parallelism a copy is taken for whole": Mutant(f"{PLACEMENT}:_settle", '("partial" if config.sequence_parallel else "full") if value == "sequence" else value', '"full" if value == "sequence" else value', "tensor"),
    "a per-head norm is taken for any norm": Mutant(f"{PLACEMENT}:_infer", 'return (), {"tensor": "partial"}, "per-head norm"', 'return (), {"tensor": "sequence"}, "per-head norm"', "no sequence"),
    "learned positions are taken for partial": Mutant(f"{PLACEMENT}:_infer", 'return (), {"tensor": "full"}, "position embedding"', 'return (), {"tensor": "partial"}, "position embedding"', "tensor"),
}  # fmt: skip

REFUSALS = {
    "a copy on several stages is let pass": Mutant(f"{PLACEMENT}:_settle", "if stages and not tied and", "if False and", "refused: stages"),
    "an undeclared copy is let pass": Mutant(f"{PLACEMENT}:_infer", 'if grid.tensor.size == 1:\n        return (), {},', 'if True:\n        return (), {"tensor": "full"},', "refused: tensor"),
    "an expert without its flag is let pass": Mutant(f"{PLACEMENT}:_infer", 'if getattr(parameter, "allreduce", True):', "if False:", "refused: expert flag"),
    "an expert's flag on another parameter is let pass": Mutant(f"{PLACEMENT}:_infer", 'if not getattr(parameter, "allreduce", True):', "if False:", "refused: not an expert"),
    "a norm of the heads under an unknown name is let pass": Mutant(f"{PLACEMENT}:_infer", "if norm and grid.tensor.size > 1 and parameter.shape[-1] not in _widths(config):", "if False:", "refused: head norm"),
    "ranks that disagree are let pass": Mutant(f"{PLACEMENT}:place", "lines.update(dict.fromkeys(_disagreements([said for _, said in everywhere])))", "pass", "refused: disagreement"),
    "two reducers are let pass": Mutant(f"{PLACEMENT}:_with_reducers", 'if by_name and p.parameter.requires_grad and reducers.get("tensor") in (NOBODY, HOOK):', "if False:", "refused: two reducers"),
}  # fmt: skip

_COMPARE, _HELD, _DIAGNOSE, _NORM, _PROBE, _AUDITOR = (f"{AUDIT}.{name}" for name in ("compare", "held", "diagnose", "norm", "probe", "auditor"))
AUDITOR = {
    "a copy is compared with itself": Mutant(f"{_COMPARE}:Comparison.run", "values[:, :2] != values[self._first[self._ids], :2]", "values[:, :2] != values[:, :2]", "audit: initialisation"),
    "only half of a tensor is hashed": Mutant(f"{_HELD}:fingerprint", "flat = tensor.detach().contiguous().view(-1)", "flat = tensor.detach().contiguous().view(-1)[: tensor.numel() // 2]", "audit: last element"),
    "the hash does not see places": Mutant(f"{_HELD}:_mixed", "(sums * odd).sum()", "sums.sum()", "audit: exchanged"),
    "weights are not compared": Mutant(f"{_HELD}:weights", 'yield Entry("buffer" if h.is_buffer else "weight", h, h.tensor.detach(), flags=flags)', 'if h.is_buffer:\n            yield Entry("buffer", h, h.tensor.detach(), flags=flags)', "audit: initialisation"),
    "buffers are not compared": Mutant(f"{_HELD}:weights", 'yield Entry("buffer" if h.is_buffer else "weight", h, h.tensor.detach(), flags=flags)', 'if not h.is_buffer:\n            yield Entry("weight", h, h.tensor.detach(), flags=flags)', "audit: bias"),
    "gradients are not compared": Mutant(f"{_HELD}:gradients", "if gradient is not None:", "if False:", "audit: hook gone"),
    "moments are not compared": Mutant(f"{_HELD}:states", "if kind in state:", "if False:", "audit: moments"),
    "second moments are not compared": Mutant(f"{_HELD}:states", '("exp_avg", "exp_avg_sq")', '("exp_avg",)', "audit: second moments"),
    "masters are not compared": Mutant(f"{_HELD}:states", "if main is not h.tensor:", "if False:", "audit: masters"),
    "one of the chained optimizers is not looked at": Mutant(f"{_HELD}:parts_of", 'list(getattr(optimizer, "chained_optimizers", [optimizer]))', 'list(getattr(optimizer, "chained_optimizers", [optimizer]))[:1]', "audit: expert's moments"),
    "tensor ranks' copies are taken for parts": Mutant("megalign.models.held:_key", 'return f"{name}|{axis}{rank}" if cut else name', 'return f"{name}|{axis}{rank}"', "audit: initialisation"),
    "copies of a cut weight are told apart by data rank": Mutant("megalign.models.held:_key", 'return f"{name}|{axis}{rank}" if cut else name', 'import torch.distributed\n    return f"{name}|{axis}{torch.distributed.get_rank()}" if cut else name', "audit: cut weight"),
    "names are exchanged once only": Mutant(f"{_COMPARE}:Comparison._exchange_labels", "if not changed.item():", "if True:", "audit: late"),
    "the size of a difference is not measured": Mutant(f"{_COMPARE}:Comparison._with_values", "worst[0] = max(", "worst[1] = max(", "audit: initialisation"),
    "ranks are named the wrong way round": Mutant(f"{_DIAGNOSE}:differences", "mismatch.classes[1:]", "mismatch.classes[:1]", "audit: initialisation"),
    "a frozen copy is not told": Mutant(f"{_DIAGNOSE}:structure", "if trains and frozen:", "if False:", "audit: frozen"),
    "a late parameter is not told": Mutant(f"{_DIAGNOSE}:structure", "if trained and late:", "if False:", "audit: late"),
    "a BF16 expert bias is not told": Mutant(f"{_DIAGNOSE}:structure", 'if key.endswith(".expert_bias") and', "if False and", "audit: bf16 bias"),
    "a missing copy is not told": Mutant(f"{_DIAGNOSE}:structure", "if absent:", "if False:", "audit: absent"),
    "copies of another size are not told": Mutant(f"{_DIAGNOSE}:structure", "if len(kinds) > 1 and", "if False and", "audit: another dtype"),
    "initialisation is taken for a late change": Mutant(f"{_DIAGNOSE}:_cause", 'if "weight" in kinds and (step == 0 or initial):', "if False:", "audit: initialisation"),
    "a missing reduction is taken for diverged moments": Mutant(f"{_DIAGNOSE}:_cause", 'if "gradient" in kinds:', "if False:", "audit: hook gone"),
    "wrong axis in the line to write": Mutant(f"{_DIAGNOSE}:_axis_of", "if inner in varies:", "if False:", "audit: hook gone"),
    "wrong line for a flag of experts": Mutant(f"{_DIAGNOSE}:_cause", 'if axis in ("data_context", "expert_data"):', "if False:", "audit: allreduce=False"),
    "diverged moments are taken for a changed weight": Mutant(f"{_DIAGNOSE}:_cause", "if moments:", "if False:", "audit: moments"),
    "a doubled count is not told": Mutant(f"{_NORM}:counting", "if times == 1 or key in found:", "if times >= 1 or key in found:", "audit: counted on every tensor rank"),
    "what is left out of the norm is not told": Mutant(f"{_NORM}:counting", "if times == 1 or key in found:", "if times <= 1 or key in found:", "audit: an expert left out"),
    "any norm will do": Mutant(f"{_NORM}:compared", "TOLERANCE * max(true, 1e-12)", "float('inf')", "audit: norm of one rank"),
    "one rank's norm is looked at": Mutant(f"{_NORM}:reported", "return [norm.item() for norm in norms]", "return [norms[0].item()]", "audit: norm of one rank"),
    "the norm counts copies twice": Mutant(f"{_NORM}:recomputed", "if comparison.holders(label)[0] == rank:", "if True:", "audit: nothing"),
    "the first step is not looked at": Mutant(f"{_AUDITOR}:Auditor.due", "step == self.started + 1 or step % self.interval == 0", "step % self.interval == 0", "looked at"),
    "no step after the first is looked at": Mutant(f"{_AUDITOR}:Auditor.due", "step == self.started + 1 or step % self.interval == 0", "step == self.started + 1", "looked at"),
    "repair leaves the values": Mutant(f"{_AUDITOR}:Auditor._repair", "copy.copy_(values.view_as(copy))", "pass", "audit: repaired"),
    "repair takes the last rank's values": Mutant(f"{_COMPARE}:Comparison.owner", "self._where[label][0]", "self._where[label][-1]", "audit: repaired"),
    "stop goes on": Mutant(f"{TRAINER}.audit:RunAudit._tell", 'if self.config.on_failure == "stop":', "if False:", "run: stop"),
    "warnings are not told": Mutant(f"{TRAINER}.audit:RunAudit._tell", "self.messages += lines", "pass", "run: warn"),
    "runs are not looked at": Mutant(f"{TRAINER}.audit:RunAudit.before_update", "self.auditor is not None and self.auditor.due(step)", "False", "run: warn"),
    "every look tells it again": Mutant(f"{_AUDITOR}:Auditor.new", "if self.first_seen[finding.parameter, finding.cause] == step", "if True", "run: warn"),
}  # fmt: skip

PROBE = {
    "the gradient is held against itself": Mutant(f"{_PROBE}:_Problem.ratio", "pairs.append((self._difference(kinds, number, max(rms, 1e-2)), along))", "pairs.append((along, along))", "probe: reduced twice"),
    "any ratio will do": Mutant(f"{_PROBE}:_Problem.ratio", "TOLERANCE * norm", "float('inf')", "probe: mean for sum"),
    "too large and too small exchanged": Mutant(f"{_PROBE}:_finding", "if ratio > 1:", "if ratio < 1:", "probe: mean for sum"),
    "missing parts are taken for a factor": Mutant(f"{_PROBE}:_finding", "if rest > 0.02 or ratio <= 0:", "if False:", "probe: one rank's part"),
    "what has a small gradient hides behind what has a large one": Mutant(f"{_PROBE}:_Problem._weight", "return min(", "return 1.0 if True else min(", "probe: small lost factor"),
    "copies are pushed apart": Mutant(f"{_PROBE}:_direction", "seed = int", "seed = torch.distributed.get_rank() + int", "probe: nothing"),
    "weights stay where they were pushed": Mutant(f"{_PROBE}:_Problem._difference", "self._push(kinds, number, -sign * size)", "pass", "probe: nothing"),
    "copies count twice along a direction": Mutant(f"{_PROBE}:_Problem.__init__", "owner[h.key] == grid.rank and", "True and", "probe: nothing"),
}  # fmt: skip

MUTANTS = {**FLAGS, **HOOKS, **REFUSALS, **AUDITOR, **PROBE}


def function_of(where: str) -> Any:
    """The function behind decorators."""
    module, _, path = where.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return inspect.unwrap(found)


def changed_source(mutant: Mutant) -> str:
    """Text of the function with the change. Raises ValueError where `old` does not stand exactly once."""
    source = textwrap.dedent(inspect.getsource(function_of(mutant.where)))
    old, new = mutant.old, mutant.new
    if source.count(old) != 1:  # methods are indented one step less here than in their file
        old, new = (text.replace("\n    ", "\n") for text in (old, new))
    if source.count(old) != 1:
        raise ValueError(f"{mutant.where} has {source.count(old)} times:\n{mutant.old}")
    return source.replace(old, new)


@contextlib.contextmanager
def broken(mutant: Mutant) -> Iterator[None]:
    """Inside, the function has the changed code."""
    function = function_of(mutant.where)
    names: dict[str, Any] = {}
    free = function.__code__.co_freevars  # `super()` means one: __class__
    source = f"def outer({', '.join(free)}):\n{textwrap.indent(changed_source(mutant), '    ')}\n    return {function.__name__}"
    code = compile(source, f"<mutant of {mutant.where}>", "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)
    exec(code, function.__globals__, names)
    changed = inspect.unwrap(names["outer"](*(cell.cell_contents for cell in function.__closure__ or ())))
    original, function.__code__ = function.__code__, changed.__code__
    try:
        yield
    finally:
        function.__code__ = original
