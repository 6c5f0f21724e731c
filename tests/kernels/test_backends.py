"""Which backend an operation takes, how it is forced, and how the tuner measures, remembers and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_interpreter import record_launches

from megalign.config.errors import ConfigError
from megalign.config.schema import Recipe
from megalign.kernels import backends, overview, reference, scaled_mm, tuning
from megalign.kernels.groups import GroupLayout
from megalign.kernels.tiles import Fp8Error
from megalign.trainer.backends import use_backends

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("MEGALIGN_FP8_BACKEND", raising=False)
    monkeypatch.setenv("MEGALIGN_FP8_TABLE", str(tmp_path / "table.json"))
    monkeypatch.setattr(backends, "_rows", {})
    monkeypatch.setattr(backends, "_taken", {})
    backends.known.cache_clear()
    yield
    backends.use(None)


def everything() -> list[torch.Tensor]:
    """Each operation once, through the public functions."""
    torch.manual_seed(0)
    x, w, dy = torch.randn(130, 200), torch.randn(72, 200), torch.randn(130, 72)
    rows, x_t = backends.quantise_rows_both(x)
    blocks, w_t = backends.quantise_blocks_both(w)
    dy_rows, dy_t = backends.quantise_rows_both(dy)
    layout = GroupLayout.of(torch.tensor([3, 0, 130]), 133)
    experts = backends.quantise_blocks(torch.randn(3, 72, 200))
    grouped, grouped_t = backends.quantise_rows_both(layout.pad(torch.randn(133, 200)))
    _, grouped_dy_t = backends.quantise_rows_both(layout.pad(torch.randn(133, 72)))
    retiled = backends.retile(backends.quantise_rows(x))
    return [
        backends.matmul(rows, blocks),
        backends.matmul(dy_rows, w_t),
        backends.wgrad(dy_t, x_t, torch.ones(72, 200)),
        backends.grouped_matmul(grouped, experts, layout),
        backends.grouped_wgrad(grouped_dy_t, grouped_t, layout),
        reference.dequantise(retiled),
    ]


def test_a_cpu_takes_the_reference():
    with record_launches() as launches:
        everything()
    assert not launches and str(backends.choose("matmul", 8192, 4096, 4096, CPU)) == "reference"
    assert backends.precision(16, 128, 128, CPU) == "fp8"


def test_forced_triton_launches_every_kernel_and_agrees():
    expected = everything()
    backends.use("triton")
    with record_launches() as launches:
        got = everything()
    kernels = [launch.kernel.split(":")[1] for launch in launches]
    assert sorted(set(kernels)) == ["matmul_kernel", "quantise_blocks_kernel", "quantise_rows_kernel", "retile_kernel", "wgrad_kernel"]
    assert len(kernels) == 13
    for a, b in zip(got, expected):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=1e-4)


def test_forcing_by_environment_and_its_errors(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MEGALIGN_FP8_BACKEND", "triton")
    assert backends.choose("wgrad", 64, 64, 64, CPU) == backends.Choice("triton", 0, "forced")
    backends.use("reference")
    assert backends.choose("wgrad", 64, 64, 64, CPU).backend == "reference"
    backends.use("auto")
    monkeypatch.setenv("MEGALIGN_FP8_BACKEND", "cutlass")
    with pytest.raises(Fp8Error, match="MEGALIGN_FP8_BACKEND=cutlass is unknown; it is auto or one of reference, triton"):
        backends.choose("matmul", 64, 64, 64, CPU)
    with pytest.raises(Fp8Error, match="'cublas' is unknown"):
        backends.use("cublas")
    backends.use("scaled_mm")
    for refused in (lambda: backends.choose("matmul", 64, 64, 64, CPU), lambda: backends.quantise_rows(torch.zeros(4, 4))):
        with pytest.raises(Fp8Error, match="scaled_mm is forced, but it needs CUDA"):
            refused()


class Hopper:
    """A CUDA device that the choice sees; nothing runs on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), cuda: str = "13.0"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        self.device = torch.device("cuda", 0)


def test_what_a_gpu_can_run(monkeypatch: pytest.MonkeyPatch):
    hopper = Hopper(monkeypatch).device
    assert [backends.why_not(backend, hopper) for backend in backends.LADDER] == [None] * 4
    assert "CUDA 12.8, block-wise scaling needs 12.9" in str(backends.why_not("scaled_mm", Hopper(monkeypatch, cuda="12.8").device))
    ampere = Hopper(monkeypatch, (8, 0)).device
    assert all("needs Hopper (sm_90), the device is sm_80" in str(backends.why_not(backend, ampere)) for backend in backends.LADDER[1:])
    assert backends.choose("matmul", 8192, 4096, 4096, ampere).backend == "reference"
    blackwell = Hopper(monkeypatch, (10, 0)).device
    assert backends.why_not("triton", blackwell) is None and backends.why_not("gluon", blackwell) and backends.why_not("scaled_mm", blackwell)


def test_forced_rungs_step_down_where_they_lack_an_operation(monkeypatch: pytest.MonkeyPatch):
    hopper = Hopper(monkeypatch).device
    backends.use("gluon")
    assert backends.choose("matmul", 8192, 4096, 4096, hopper) == backends.Choice("gluon", 0, "forced")
    assert backends.choose("wgrad", 8192, 4096, 4096, hopper).backend == "scaled_mm"
    assert backends.choose("grouped_wgrad", 8192, 4096, 4096, hopper) == backends.Choice("triton", 0, "forced gluon lacks it")
    backends.use("scaled_mm")
    assert backends.choose("matmul", 8190, 4096, 4096, hopper).backend == "triton"
    assert backends.choose("matmul", 8192, 4096, 4096, hopper).backend == "scaled_mm"


def test_small_layers_stay_bf16_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    hopper = Hopper(monkeypatch).device
    assert backends.precision(2048, 1024, 1024, hopper) == "bf16"
    assert backends.precision(8192, 1024, 1024, hopper) == backends.precision(2048, 4096, 4096, hopper) == "fp8"
    backends.use("triton")
    assert backends.precision(2048, 1024, 1024, hopper) == "fp8"


def test_a_layer_that_does_not_pay_stays_as_it_is(monkeypatch: pytest.MonkeyPatch):
    from megalign.kernels.linear import Fp8Linear

    layer = torch.nn.Linear(1024, 1024, dtype=torch.bfloat16)
    assert type(Fp8Linear.where_it_pays(layer, 2048)) is Fp8Linear  # a CPU has FP8's numbers, not its speed
    hopper = Hopper(monkeypatch).device
    monkeypatch.setattr(backends, "precision", lambda m, n, k, _, exact=backends.precision: exact(m, n, k, hopper))
    assert Fp8Linear.where_it_pays(layer, 2048) is layer
    assert type(Fp8Linear.where_it_pays(layer, 8192)) is Fp8Linear


def test_scaled_mm_says_what_it_cannot_take():
    assert scaled_mm.why_not("matmul", 8192, 4096, 4096) is None and scaled_mm.why_not("wgrad", 8192, 4096, 7168) is None
    for shape in ((8190, 4096, 4096), (8192, 4090, 4096), (8192, 4096, 640)):
        with pytest.raises(Fp8Error, match="scaled_mm: M = .* must be a multiple of 4"):
            m, n, k = shape
            scaled_mm.matmul(reference.quantise_rows(torch.zeros(m, 1).expand(m, k)), reference.quantise_blocks(torch.zeros(n, 1).expand(n, k)))
    assert scaled_mm.why_not("grouped_matmul", 1, 1, 1) == "torch has no block-wise grouped_matmul"


def test_scaled_mm_hands_over_scales_as_torch_tells_recipes_by(monkeypatch: pytest.MonkeyPatch):
    """Shapes and strides of ScaledBlas.cpp: is_blockwise_1x128_scaling, is_blockwise_128x128_scaling."""
    seen: list[dict[str, Any]] = []

    def scaled(a: torch.Tensor, b: torch.Tensor, **given: Any) -> torch.Tensor:
        seen.append({"a": a, "b": b, **given})
        sa = given["scale_a"].repeat_interleave(128, 1)
        sb = given["scale_b"].t()
        sb = sb.repeat_interleave(128, 1) if sb.shape[0] == b.shape[1] else sb.repeat_interleave(128, 1).repeat_interleave(128, 0)[: b.shape[1]]
        return ((a.float() * sa) @ (b.t().float() * sb).t()).to(given["out_dtype"])

    monkeypatch.setattr(torch, "_scaled_mm", scaled)
    m, n, k = 256, 272, 512
    x, w = reference.quantise_rows(torch.randn(m, k)), reference.quantise_blocks(torch.randn(n, k))
    torch.testing.assert_close(scaled_mm.matmul(x, w, torch.float32), reference.matmul(x, w, torch.float32), rtol=1e-4, atol=1e-3)
    call = seen[-1]
    assert call["a"].stride() == (512, 1) and call["b"].shape == (k, n) and call["b"].stride() == (1, 512)
    assert call["scale_a"].shape == (m, 4) and call["scale_a"].stride() == (1, m)
    assert call["scale_b"].t().shape == (3, 4) and call["scale_b"].t().stride() == (4, 1)
    dy_t, x_t = reference.quantise_rows(torch.randn(64, m)), reference.quantise_rows(torch.randn(48, m))
    main = torch.ones(64, 48)
    torch.testing.assert_close(scaled_mm.wgrad(dy_t, x_t, main), reference.wgrad(dy_t, x_t) + 1, rtol=1e-4, atol=1e-3)
    assert seen[-1]["scale_b"].t().shape == (48, 2) and seen[-1]["scale_b"].t().stride() == (1, 48)
    with pytest.raises(Fp8Error, match="M = 100 above 128: one scale a row is another recipe to torch"):
        scaled_mm.wgrad(reference.quantise_rows(torch.randn(64, 100)), reference.quantise_rows(torch.randn(48, 100)))


# --- the tuner --------------------------------------------------------------------------------------------------------


def test_the_fastest_right_candidate_is_chosen():
    good = torch.randn(8, 8)

    def broken() -> torch.Tensor:
        raise RuntimeError("no kernel image is available\nfor this device")

    ways: dict[str, Callable[[], torch.Tensor]] = {"a": lambda: good, "b": lambda: good * 1.001, "wrong": lambda: good * 1.02, "nan": lambda: good * torch.nan, "broken": broken}
    times = iter([3e-3, 2e-3])
    row = tuning.measure(ways, ways, lambda: good, lambda run: next(times))
    assert row.chosen == "b" and row.seconds == {"a": 3e-3, "b": 2e-3}
    assert row.out["wrong"].startswith("wrong: relative error 2.0e-02") and "nan" in row.out["nan"]
    assert row.out["broken"] == "RuntimeError: no kernel image is available"
    assert tuning.measure({"broken": broken}, {"broken": broken}, lambda: good, lambda run: 1.0).chosen == "reference"

    def full() -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for ways, checks in (({"a": lambda: good, "full": full}, {"a": lambda: good, "full": lambda: good}), ({"full": full}, {"full": full})):
        with pytest.raises(torch.OutOfMemoryError):  # else the row would be kept, and a model that fills the device would take the reference for ever
            tuning.measure(ways, checks, lambda: good, lambda run: (run(), 1.0)[1])


@pytest.mark.parametrize("operation", backends.TUNED)
def test_tuning_compares_and_times_every_configuration(operation: backends.Operation):
    timed: list[Callable[[], Any]] = []

    def timer(run: Callable[[], Any]) -> float:
        timed.append(run)
        return 1.0 / len(timed)

    with record_launches() as launches:
        row = backends.tune(operation, 64, 136, 200, CPU, torch.float32, timer)
    count = {"matmul": 4, "wgrad": 3}[operation]
    assert list(row.seconds) == [f"triton:{i}" for i in range(count)] and row.chosen == f"triton:{count - 1}" and not row.out
    assert sum(launch.kernel.endswith(f"{operation}_kernel") for launch in launches) == count
    assert timed[0]().shape == ((64, 136) if operation == "matmul" else (136, 200))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_added_is_measured_so(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """A rung without accumulation pays a temporary: the two uses have rows of their own, in the type of the main gradient."""
    with record_launches() as launches:
        row = backends.tune("wgrad", 64, 136, 200, CPU, dtype, lambda run: (run(), 1.0)[1], True)
    assert not row.out and len(row.seconds) == 3
    assert [launch.constants["ACCUMULATE"] for launch in launches if launch.kernel.endswith(":wgrad_kernel")] == [True] * 6
    hopper = Hopper(monkeypatch).device
    asked = []
    monkeypatch.setattr(backends, "tune", lambda *a: (asked.append((a[5], a[7])), tuning.Row("", {"triton:1" if a[7] else "scaled_mm:0": 1e-4}))[1])
    assert backends.choose("wgrad", 8192, 4096, 4096, hopper, dtype) == backends.Choice("scaled_mm", 0, "measured")
    assert backends.choose("wgrad", 8192, 4096, 4096, hopper, dtype, True) == backends.Choice("triton", 1, "measured")
    assert asked == [(dtype, False), (dtype, True)]
    taken = []
    monkeypatch.setattr(backends, "choose", lambda *a: (taken.append(a[5:]), backends.Choice("reference", 0, "device"))[1])
    dy_t, x_t = reference.quantise_rows(torch.randn(4, 128)), reference.quantise_rows(torch.randn(8, 128))
    backends.wgrad(dy_t, x_t, torch.zeros(4, 8, dtype=dtype))
    backends.wgrad(dy_t, x_t, dtype=dtype)
    assert taken == [(dtype, True), (dtype, False)]


def test_a_measured_shape_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    hopper = Hopper(monkeypatch).device
    calls: list[tuple[Any, ...]] = []

    def tune(*arguments: Any) -> tuning.Row:
        calls.append(arguments)
        return tuning.Row("scaled_mm:0", {"triton:2": 1e-4, "scaled_mm:0": 9e-5, "triton:1": 2e-4}, {"gluon:0": "wrong"})

    monkeypatch.setattr(backends, "tune", tune)
    assert backends.choose("matmul", 5000, 4096, 7168, hopper) == backends.Choice("scaled_mm", 0, "measured")
    assert backends.choose("matmul", 8192, 4096, 7168, hopper).backend == "scaled_mm"  # 5000 and 8192 share a row
    assert backends.choose("matmul", 8190, 4096, 7168, hopper) == backends.Choice("triton", 2, "measured")  # which scaled_mm cannot take
    assert [call[1] for call in calls] == [8192]
    backends._rows.clear()  # a new process reads the file
    assert backends.choose("matmul", 8192, 4096, 7168, hopper).backend == "scaled_mm" and len(calls) == 1
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["machine"]["device"] == "NVIDIA H200" and list(table["rows"]) == ["matmul 8192 4096 7168 bfloat16"]
    for damage in ("", "{", '{"format": 0}', json.dumps({**table, "machine": {**table["machine"], "torch": "1.0"}})):
        (tmp_path / "table.json").write_text(damage)
        backends._rows.clear()
        before = len(calls)
        backends.choose("matmul", 8192, 4096, 7168, hopper)
        assert len(calls) == before + 1
    tuning.save(tmp_path / "table.json", hopper, {"matmul 8192 4096 7168 bfloat16": tuning.Row("triton:17", {"triton:17": 1.0})})
    backends._rows.clear()  # a row of another version is measured again
    assert backends.choose("matmul", 8192, 4096, 7168, hopper).backend == "scaled_mm"
    assert backends.choose("grouped_matmul", 8192, 4096, 7168, hopper) == backends.Choice("triton", 0, "default")


def test_tuning_draws_no_number_of_the_run():
    """A shape measured in the first run and remembered in the second: both see the same dropout, the same samples."""
    before = torch.get_rng_state()
    operands = [backends._operands("wgrad", 64, 72, 80, CPU)[0] for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(*(t.data.view(torch.uint8) for t in operands))  # fresh ones all the same


def test_a_device_without_room_for_tuning_takes_the_default(monkeypatch: pytest.MonkeyPatch):
    hopper = Hopper(monkeypatch).device
    sizes = []

    def full(operation: str, m: int, *rest: Any) -> tuning.Row:
        sizes.append(m)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backends, "tune", full)
    assert backends.choose("matmul", 3_000_000, 4096, 7168, hopper) == backends.Choice("triton", 0, "default")
    assert sizes == [65536] and not backends._rows[hopper.type, hopper.index]  # and it is tried again


def test_no_candidate_is_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    hopper = Hopper(monkeypatch).device
    monkeypatch.setattr(backends, "tune", lambda *a: tuning.Row("reference", {}, {"triton:0": "wrong"}))
    assert backends.choose("matmul", 8192, 4096, 4096, hopper) == backends.Choice("reference", 0, "measured")
    assert not (tmp_path / "table.json").exists()  # whatever it was, the next process tries again


def test_a_choice_is_made_once(monkeypatch: pytest.MonkeyPatch):
    rows, blocks = reference.quantise_rows(torch.randn(4, 128)), reference.quantise_blocks(torch.randn(4, 128))
    backends.matmul(rows, blocks)
    monkeypatch.setattr(backends, "choose", lambda *a: pytest.fail("chosen again"))
    backends.matmul(rows, blocks)


def test_nothing_is_measured_where_it_may_not(monkeypatch: pytest.MonkeyPatch):
    hopper = Hopper(monkeypatch).device
    monkeypatch.setattr(backends, "tune", lambda *a: pytest.fail("measured"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backends.choose("matmul", 8192, 4096, 4096, hopper) == backends.Choice("triton", 0, "default")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("MEGALIGN_FP8_TUNE", "0")
    assert backends.choose("matmul", 8192, 4096, 4096, hopper).source == "default"


def test_rows_are_added_to_a_table(tmp_path: Path):
    path = tmp_path / "deep" / "table.json"
    tuning.save(path, CPU, {"a": tuning.Row("triton:0")})
    tuning.save(path, CPU, {"b": tuning.Row("scaled_mm:0", {"scaled_mm:0": 1.0})})
    assert tuning.load(path, CPU) == {"a": tuning.Row("triton:0"), "b": tuning.Row("scaled_mm:0", {"scaled_mm:0": 1.0})}
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_a_recipe_forces_a_backend():
    with record_launches() as launches:
        use_backends(Recipe.model_validate({"kernels": {"fp8_backend": "triton"}}))
        backends.quantise_rows(torch.zeros(4, 4))
        use_backends(Recipe())
        backends.quantise_rows(torch.zeros(4, 4))
    assert [launch.kernel.split(":")[1] for launch in launches] == ["quantise_rows_kernel"]


def test_a_backend_that_the_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="kernels.fp8_backend=gluon: this machine has no gluon backend: it needs CUDA, the device is cpu; set it to auto or reference or triton"):
        use_backends(Recipe.model_validate({"kernels": {"fp8_backend": "gluon"}}))
    monkeypatch.setenv("MEGALIGN_FP8_BACKEND", "scaled_mm")
    with pytest.raises(ConfigError, match="MEGALIGN_FP8_BACKEND=scaled_mm: this machine has no scaled_mm backend"):
        use_backends(Recipe())
    use_backends(Recipe.model_validate({"kernels": {"fp8_backend": "reference"}}))  # the recipe wins
    with pytest.raises(ValueError, match="'auto', 'reference', 'triton', 'scaled_mm' or 'gluon'"):
        Recipe.model_validate({"kernels": {"fp8_backend": "cutlass"}})


# --- megalign kernels -------------------------------------------------------------------------------------------------


def test_the_overview_names_machine_rungs_and_choices(monkeypatch: pytest.MonkeyPatch):
    text = "\n".join(overview.overview([(8192, 4096, 7168)], CPU))
    assert "forced: none" in text and "gluon       it needs CUDA, the device is cpu" in text
    assert text.splitlines()[-1].split() == "8192 x 4096 x 7168 fp8 reference reference reference device".split()
    hopper = Hopper(monkeypatch).device
    monkeypatch.setattr(backends, "tune", lambda operation, *a: tuning.Row("", {"scaled_mm:0" if operation == "matmul" else "triton:1": 1.0}))
    text = "\n".join(overview.overview([(512, 512, 512)], hopper))
    assert "NVIDIA H200" in text and "table.json" in text
    assert text.splitlines()[-1].split() == "512 x 512 x 512 bf16 scaled_mm scaled_mm triton:1 measured".split()


def test_the_command(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TRITON_INTERPRET": "0"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "megalign", "kernels", *arguments], env=environment, capture_output=True, text=True)

    shown = run("256x128x512")
    assert shown.returncode == 0 and "256 x 128 x 512" in shown.stdout and "reference   yes" in shown.stdout
    (tmp_path / "forced.yaml").write_text("kernels: {fp8_backend: reference}\n")
    assert "forced: reference" in run("--recipe", str(tmp_path / "forced.yaml"), "256x128x512").stdout
    for arguments, message in (("256x128",), "is not TOKENSxOUTxIN"), (("\u00b2x1x1",), "is not TOKENSxOUTxIN"), (("--backend", "cuda"), "'cuda' is unknown; it is auto or one of"):
        refused = run(*arguments)
        assert refused.returncode == 1 and message in refused.stderr and "Traceback" not in refused.stderr
