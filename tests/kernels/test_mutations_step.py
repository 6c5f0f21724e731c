"""AdamW and log-probability kernels broken on purpose: each row turns the check of the sound kernel red."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from mutants import mutant
from test_logprob import gradients, inputs, oracle
from triton.runtime.errors import InterpreterError

from megalign.kernels import adamw_triton, logprob, logprob_triton
from megalign.kernels.adamw import MixedPrecisionAdamW
from megalign.kernels.rounding import Place
from megalign.kernels.weight import Fp8Weight

BF16 = torch.bfloat16


def step(module: ModuleType, fp8: bool) -> None:
    """Two steps of a parameter with tails in both directions, cut by columns out of a larger one: the bits of torch."""
    runs = []
    for update in (None, module.update_triton):
        start = torch.randn(140, 150, generator=torch.Generator().manual_seed(0))
        start[0, 0] = 456 / 64  # the largest of its tile, between the thresholds 448 and 464
        p = torch.nn.Parameter(start.to(BF16))
        p.place = Place(offset=2**33 + 150, columns=150, row_stride=300)  # pyright: ignore[reportAttributeAccessIssue]
        if fp8:
            Fp8Weight.of(p)
        optimizer = MixedPrecisionAdamW([("w", p)], lr=1e-2, weight_decay=0.1)
        if update is not None:
            optimizer._backend = lambda parameter, update=update: update
        for number in range(2):
            p.grad = torch.randn(140, 150, generator=torch.Generator().manual_seed(number)).to(BF16)
            optimizer.step(gradient_scale=0.3)
        runs.append([p.detach(), *(optimizer.state[p][name] for name in ("master", "exp_avg", "exp_avg_sq"))])
        if fp8:
            runs[-1] += [t for part in Fp8Weight.of(p).current(p) for t in (part.data.view(torch.uint8), part.scale)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def score(module: ModuleType, _: bool) -> None:
    """Log-probabilities, entropy and gradients with tails everywhere."""
    hidden, weight, targets = inputs()
    upstreams = [torch.randn(len(targets), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprob, "_backend", lambda _: module)
        patch.setattr(module, "processors", lambda _: 0)  # one program walks all tiles of the vocabulary
        values, grads = gradients(lambda h, w, t: logprob.linear_logprobs(h, w, t, entropy=True), hidden, weight, targets, upstreams)
    expected, expected_grads = gradients(oracle, hidden.double(), weight.double(), targets, upstreams)
    for found, exact in zip((*values, *grads), (*expected, *expected_grads)):
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


BREAKS = [
    (step, adamw_triton, False, "a round less", "for _ in tl.static_range(7)", "for _ in tl.static_range(6)"),
    (step, adamw_triton, False, "high half of the place ignored", "(place >> 32).to(tl.uint32) + key", "key"),
    (step, adamw_triton, False, "truncated instead of rounded", "(bits + (noise & 0xFFFF).to(tl.int32)) & -0x10000", "bits & -0x10000"),
    (step, adamw_triton, False, "one word for both moments", "v = stochastic(v, noise_v)", "v = stochastic(v, noise_m)"),
    (step, adamw_triton, False, "gradient not scaled", "mask=mask, other=0.0).to(tl.float32) * scale\n", "mask=mask, other=0.0).to(tl.float32)\n"),
    (step, adamw_triton, False, "decay of the update", "w * decay - ", "w - "),
    (step, adamw_triton, False, "place of the shard, not of the whole", "place += place // columns * (row_stride - columns)", "place += 0"),
    (step, adamw_triton, False, "tail dropped", "(-(-n // BLOCK),)", "(n // BLOCK,)"),
    (step, adamw_triton, True, "rows of the whole ignored", "(group * N + rows)[:, None] * row_stride", "(group * N + rows)[:, None] * K"),
    (step, adamw_triton, True, "scale of the last slab", "tl.maximum(amax_column.to(tl.int32, bitcast=True), tl.max(magnitude, 0))", "tl.max(magnitude, 0)"),
    (step, adamw_triton, True, "transpose not transposed", "tl.trans(q)", "q"),
    (step, adamw_triton, True, "scale index of the transpose", "(group * tiles_k + tile_k) * tiles_n + tile_n", "(group * tiles_n + tile_n) * tiles_k + tile_k"),
    (step, adamw_triton, True, "scale of the other rule", "tile_scale(bits, True)", "tile_scale(bits, False)"),
    (step, adamw_triton, True, "padding counts", "to_e4m3(tile, factor, inside, True)", "to_e4m3(tile + 1.0, factor, inside, True)"),
    (step, adamw_triton, True, "last tile column dropped", "ceil_tiles(columns), groups", "columns // 128, groups"),
    (score, logprob_triton, False, "sum not rescaled to the new maximum", "total = scale * total +", "total = total +"),
    (score, logprob_triton, False, "weighted sum not shifted", "scale * (weighted + shift * total)", "scale * weighted"),
    (score, logprob_triton, False, "padding counts", "exponentials = tl.where(real, tl.exp(relative), 0.0)", "exponentials = tl.exp(relative)"),
    (score, logprob_triton, False, "last tiles of a split dropped", "last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(V, COLUMNS))", "last = tl.minimum((split + 1) * tiles_per_split, V // COLUMNS)"),
    (score, logprob_triton, False, "tail of the depth dropped", "for start in range(0, D, DEPTH)", "for start in range(0, D // DEPTH * DEPTH, DEPTH)"),
    (score, logprob_triton, False, "target of another tile", "own += tl.sum(", "own = tl.sum("),
    (score, logprob_triton, False, "one-hot forgotten", "tl.where(columns[None, :] == target[:, None], g, 0.0) - ", "- "),
    (score, logprob_triton, False, "entropy not in its gradient", "factor += h * (log_p + tl.load(entropy_ptr + rows, mask=inside, other=0.0)[:, None])", "factor += h * log_p"),
]  # fmt: skip


@pytest.mark.parametrize("check, module, fp8, what, old, new", BREAKS, ids=[row[3] for row in BREAKS])
def test_a_broken_step_is_noticed(check, module: ModuleType, fp8: bool, what: str, old: str, new: str, tmp_path: Path):
    broken = mutant(module, tmp_path, old, new)
    with pytest.raises((AssertionError, InterpreterError)):
        check(broken, fp8)


@pytest.mark.parametrize("check, module, fp8", [(step, adamw_triton, False), (step, adamw_triton, True), (score, logprob_triton, False)])
def test_the_sound_kernel_passes(check, module: ModuleType, fp8: bool, tmp_path: Path):
    check(mutant(module, tmp_path, "from __future__ import annotations\n", "from __future__ import annotations\n\n"), fp8)
