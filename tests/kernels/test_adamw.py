"""MixedPrecisionAdamW (torch path): against torch.optim.AdamW, the small update that BF16 loses, rounding, resume, shards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megalign.kernels.adamw import MixedPrecisionAdamW
from megalign.kernels.rounding import Place, noise_key, philox, stochastic_bf16

BF16, FP32 = torch.bfloat16, torch.float32


def parameter(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def train(optimizer: MixedPrecisionAdamW, steps: int, first: int = 0) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, first + steps):
        for i, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + i)).to(p.dtype)
        optimizer.step()


def test_philox_gives_the_published_numbers():
    """Known answers of Random123 (kat_vectors, philox2x32 7 rounds): counter, counter, key -> two words."""
    for left, right, key, expected in (
        (0x00000000, 0x00000000, 0x00000000, (0x257A3673, 0xCD26BE2A)),
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, (0xAB302C4D, 0x3DC9D239)),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, (0xBEDBBE6B, 0xE4C770B3)),
    ):
        words = philox(torch.tensor([left]), right, key)
        assert tuple(int(word) for word in words) == expected


def test_stochastic_rounding_keeps_the_mean_and_the_neighbours():
    n = 1 << 16
    for value in (1.001, -3.7e-5, 1e-39, 3e38):
        x = torch.full((n,), value)
        rounded = stochastic_bf16(x, torch.arange(n)).double()
        below = (x.view(torch.int32) & -0x10000).view(FP32).double()[0]
        assert len(rounded.unique()) == 2 and below in rounded
        assert float(rounded.mean()) == pytest.approx(float(x[0]), rel=1e-7, abs=1e-44)  # all 2^16 noises once: exact
    special = torch.tensor([0.0, -0.0, 1.5, math.inf, -math.inf, math.nan])
    kept = stochastic_bf16(special, torch.full((6,), 0xFFFF))
    assert torch.equal(kept[:5].float(), special[:5]) and kept[5].isnan() and torch.signbit(kept[1])


def test_a_small_update_moves_the_weight():
    """F1: 1000 updates of 1e-7 at 0.02. In plain BF16 none of them is seen; the master sums them to 1e-4."""
    plain = torch.tensor([0.02], dtype=BF16)
    for _ in range(1000):
        plain -= 1e-7
    assert plain == torch.tensor([0.02], dtype=BF16)

    for moments in (BF16, FP32):
        p = torch.nn.Parameter(torch.full((256,), 0.02, dtype=BF16))
        start = p.detach().float()
        optimizer = MixedPrecisionAdamW([p], lr=1e-7, weight_decay=0.0, eps=0.0, first_moment=moments, second_moment=moments)
        for _ in range(1000):
            p.grad = torch.ones(256, dtype=BF16)  # Adam: each update is lr
            optimizer.step()
        moved = (start - optimizer.master(p)).mean()
        # An update is 53.7 units in the last place of FP32 at .02, and rounds to 54: +.6 %.
        assert float(moved) == pytest.approx(1e-4, rel=1e-2)
        assert torch.equal(p, optimizer.master(p).to(BF16)) and bool((p < start).all())  # 1e-4 is 80 % of a BF16 step at .02


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fp32_states_give_torchs_adamw(decay: float):
    """Same formula, other order of operations: 50 steps agree to FP32 rounding, against float64 as exactly as torch's own."""
    settings: dict[str, Any] = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    ours = parameter(37, 53, dtype=FP32)
    theirs, exact = (torch.nn.Parameter(ours.detach().to(dtype, copy=True)) for dtype in (FP32, torch.float64))
    optimizers = [
        MixedPrecisionAdamW([ours], first_moment=FP32, second_moment=FP32, **settings),
        torch.optim.AdamW([theirs], foreach=False, **settings),
        torch.optim.AdamW([exact], foreach=False, **settings),
    ]
    for step in range(50):
        gradient = torch.randn(37, 53, generator=torch.Generator().manual_seed(step)) * 10 ** (-step % 7)
        for p, optimizer in zip((ours, theirs, exact), optimizers):
            p.grad = gradient.to(p.dtype)
            optimizer.step()
    error, own = ((p.double() - exact).abs().max().item() for p in (ours, theirs))
    assert error < 1.5 * own + 1e-7, (error, own)


def test_gradient_scale_multiplies_the_gradient():
    scaled, plain = parameter(300), parameter(300)
    one, two = (MixedPrecisionAdamW([p], lr=1e-2) for p in (scaled, plain))
    scaled.grad, plain.grad = torch.full((300,), 4.0, dtype=BF16), torch.full((300,), 1.0, dtype=BF16)
    one.step(gradient_scale=torch.tensor(0.25))
    two.step()
    assert torch.equal(one.state[scaled]["exp_avg_sq"], two.state[plain]["exp_avg_sq"]) and torch.equal(scaled, plain)


@pytest.mark.parametrize("moments", [(BF16, BF16), (BF16, FP32), (FP32, FP32)])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_states_keep_their_types_and_a_resume_is_exact(moments: tuple[torch.dtype, torch.dtype], dtype: torch.dtype, tmp_path):
    """F2, also after resume: 3 + 3 steps through a file equal 6, bit for bit. (torch's load casts states to the parameter's type.)"""

    def make() -> tuple[torch.nn.Parameter, MixedPrecisionAdamW]:
        p = parameter(70, 30, dtype=dtype)
        return p, MixedPrecisionAdamW([("weight", p)], lr=1e-2, first_moment=moments[0], second_moment=moments[1])

    whole, optimizer = make()
    train(optimizer, 6)
    half, optimizer_half = make()
    train(optimizer_half, 3)
    torch.save({"p": half.detach(), "optimizer": optimizer_half.state_dict()}, tmp_path / "state.pt")

    saved = torch.load(tmp_path / "state.pt")
    resumed, optimizer_resumed = make()
    resumed.data.copy_(saved["p"])
    optimizer_resumed.load_state_dict(saved["optimizer"])
    state = optimizer_resumed.state[resumed]
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == moments
    assert ("master" in state) == (dtype != FP32) and optimizer_resumed.master(resumed).dtype == FP32
    train(optimizer_resumed, 3, first=3)
    assert torch.equal(resumed, whole)
    for name, value in optimizer.state[whole].items():
        assert torch.equal(state_now := optimizer_resumed.state[resumed][name], value), (name, state_now)


def test_a_checkpoint_of_other_types_is_refused():
    p = parameter(8)
    saved = MixedPrecisionAdamW([p], first_moment=FP32, second_moment=FP32)
    saved.create_states()
    with pytest.raises(ValueError, match="first_moment is torch.float32 in the checkpoint, but this optimizer keeps torch.bfloat16"):
        MixedPrecisionAdamW([p]).load_state_dict(saved.state_dict())
    state = saved.state_dict()
    del state["state"][0]["master"]
    with pytest.raises(ValueError, match="'master' of parameter 0 is missing in the checkpoint"):
        MixedPrecisionAdamW([p], first_moment=FP32, second_moment=FP32).load_state_dict(state)


def moment_after_shrinking(rounding: str, second_moment: torch.dtype, beta2: float) -> float:
    """Mean relative error of v after 2000 steps of unit gradients and 2000 ten times smaller, against float64."""
    n = 4096
    p = torch.nn.Parameter(torch.zeros(n))
    allowed = beta2 if rounding == "stochastic" or second_moment == FP32 else min(beta2, 0.99)
    optimizer = MixedPrecisionAdamW([p], lr=0.0, betas=(0.9, allowed), first_moment=FP32, second_moment=second_moment, rounding=rounding)
    optimizer.param_groups[0]["betas"] = (0.9, beta2)  # past the refusal, to measure what it refuses
    generator, exact = torch.Generator().manual_seed(1), torch.zeros(n, dtype=torch.float64)
    for step in range(4000):
        p.grad = torch.randn(n, generator=generator) * (1.0 if step < 2000 else 0.1)
        exact = beta2 * exact + (1 - beta2) * p.grad.double() ** 2
        optimizer.step()
    return float(((optimizer.state[p]["exp_avg_sq"].double() - exact) / exact).mean())


def test_why_bf16_second_moments_are_not_rounded_to_nearest():
    """beta2 = .999: +730 % once gradients fell tenfold; stochastic rounding and FP32 keep the mean, and so does beta2 = .95."""
    assert 6.5 < moment_after_shrinking("nearest", BF16, 0.999) < 8.0
    assert abs(moment_after_shrinking("stochastic", BF16, 0.999)) < 0.02
    assert abs(moment_after_shrinking("nearest", FP32, 0.999)) < 1e-4  # .999 in FP32 is 1e-8 off, times 1 / (1 - .999)
    assert abs(moment_after_shrinking("nearest", BF16, 0.95)) < 0.05


def test_the_broken_combination_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"beta2 = 0.999 with BF16 second moments rounded to nearest.*set rounding='stochastic', second_moment=torch.float32, or beta2 <= .99"):
        MixedPrecisionAdamW([parameter(4)], rounding="nearest")
    accepted: dict[str, Any]
    for accepted in (dict(rounding="stochastic"), dict(rounding="nearest", second_moment=FP32), dict(rounding="nearest", betas=(0.9, 0.99))):
        MixedPrecisionAdamW([parameter(4)], **accepted)
    one = MixedPrecisionAdamW([parameter(4)])
    with pytest.raises(ValueError, match="rounded to nearest"):
        one.add_param_group({"params": [parameter(4)], "rounding": "nearest"})
    assert len(one.param_groups) == 1
    later = MixedPrecisionAdamW([parameter(4)], rounding="nearest", betas=(0.9, 0.95))
    with pytest.raises(ValueError, match="rounded to nearest"):
        state = later.state_dict()
        state["param_groups"][0]["betas"] = (0.9, 0.999)
        later.load_state_dict(state)


@pytest.mark.parametrize("options, message", [
    (dict(rounding="up"), "rounding = 'up'; it must be one of 'stochastic', 'nearest'"),
    (dict(second_moment=torch.float16), "second_moment = torch.float16"),
    (dict(lr=-1.0), "lr = -1.0"),
    (dict(betas=(0.9, 1.0)), "beta2 = 1.0"),
    (dict(backend="cuda"), "backend = 'cuda'"),
])  # fmt: skip
def test_settings_are_checked(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MixedPrecisionAdamW([parameter(4)], **options)


def test_parameters_that_cannot_be_stepped_are_refused():
    p = torch.nn.Parameter(torch.randn(4, 6).t())
    with pytest.raises(ValueError, match="needs contiguous parameters"):
        MixedPrecisionAdamW([p]).create_states()
    embedding = torch.nn.Embedding(4, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse gradient"):
        MixedPrecisionAdamW(embedding.parameters()).step()


def shard(kind: str, whole: torch.Tensor) -> tuple[torch.Tensor, Place]:
    rows, columns = whole.shape
    if kind == "rows":
        return whole[rows // 2 :], Place(offset=rows // 2 * columns)
    part = whole[:, columns // 2 :].contiguous()
    place = Place(offset=columns // 2, columns=columns - columns // 2, row_stride=columns)
    if kind == "columns":
        return part, place
    first = part.numel() // 3  # what a distributed optimizer holds of that shard
    return part.view(-1)[first:], Place(place.offset, place.columns, place.row_stride, start=first)


@pytest.mark.parametrize("kind", ["rows", "columns", "columns, flat slice"])
def test_a_shard_gets_the_bits_of_the_whole(kind: str):
    """Rounding noise belongs to a place in the whole parameter, so states do not depend on how it is cut."""
    gradient = torch.randn(50, 46).to(BF16)
    whole = parameter(50, 46)
    part_data, place = shard(kind, whole.detach())
    part = torch.nn.Parameter(part_data.clone())
    part.place = place  # pyright: ignore[reportAttributeAccessIssue]
    optimizers = [MixedPrecisionAdamW([("layer.weight", p)], lr=1e-2) for p in (whole, part)]
    whole.grad, part.grad = gradient, shard(kind, gradient)[0].clone()
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    for name in ("exp_avg", "exp_avg_sq", "master"):
        of_whole = shard(kind, optimizers[0].state[whole][name])[0]
        assert torch.equal(optimizers[1].state[part][name], of_whole), name
    assert torch.equal(part, shard(kind, whole.detach())[0])


def test_noise_differs_between_steps_seeds_and_names():
    def moments(name: str, seed: int, steps: int) -> torch.Tensor:
        p = torch.nn.Parameter(torch.zeros(4096, dtype=BF16))
        optimizer = MixedPrecisionAdamW([(name, p)], seed=seed)
        for _ in range(steps):
            p.grad = torch.full((4096,), 1.0 + 2.0**-7, dtype=BF16)
            optimizer.step()
        return optimizer.state[p]["exp_avg"]

    base = moments("a", 0, 1)
    assert torch.equal(base, moments("a", 0, 1))
    for other in (moments("b", 0, 1), moments("a", 1, 1)):
        assert 0.05 < float((base != other).float().mean()) < 0.95
    assert noise_key(0, "a") != noise_key(1, "a")


def test_two_words_of_one_counter_are_uncorrelated():
    first, second = philox(torch.arange(1 << 16), 1, noise_key(0, "w"))
    a, b = ((word & 0xFFFF).double() - 32767.5 for word in (first, second))
    assert abs(float((a * b).mean() / (a.std() * b.std()))) < 4 / 256  # four standard errors
    assert abs(float((a[1:] * a[:-1]).mean() / a.var())) < 4 / 256


def test_a_placeholder_is_not_taken_for_a_gradient():
    """A layer that adds to main_grad itself leaves an empty .grad for megatron's hooks, and says so."""
    p, q = parameter(64), parameter(64)
    p.main_grad, p.grad, p.grad_added_to_main_grad = torch.full((64,), 0.5), torch.full((64,), math.nan, dtype=BF16), True  # pyright: ignore[reportAttributeAccessIssue]
    q.grad = torch.full((64,), 0.5, dtype=BF16)
    for x in (p, q):
        MixedPrecisionAdamW([x], lr=1e-2).step()
    assert torch.equal(p, q)


def test_main_gradients_are_used_where_there_is_no_other():
    p, q = parameter(64), parameter(64)
    p.main_grad, q.grad = torch.full((64,), 0.5), torch.full((64,), 0.5, dtype=BF16)  # pyright: ignore[reportAttributeAccessIssue]
    for x in (p, q):
        MixedPrecisionAdamW([x], lr=1e-2).step()
    assert torch.equal(p, q) and not torch.equal(p, parameter(64))
