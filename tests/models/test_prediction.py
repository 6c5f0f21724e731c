"""Multi-token prediction against its formula, written out over transformers' layers, and its weight table both ways."""

from __future__ import annotations

from typing import Any

import prediction_checks as checks
import pytest
import torch
from ranks import run_ranks

from megalign.batch import Ahead, collate, look_ahead
from megalign.data.rows import Example
from megalign.models.hf.registry import family_of_model, model_config_from_hf
from megalign.models.hf.table import ConversionError, Dimensions


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[checks.Oracle, dict[str, torch.Tensor], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("prediction") / "hub"
    oracle = checks.Oracle()
    saved = oracle.save(folder)
    return oracle, saved, run_ranks(checks.ours, 1, folder, {})[0]


def test_losses_and_gradients_are_the_formula(found: Any) -> None:
    oracle, _, ours = found
    main, *ahead = oracle.losses()
    total = main + 0.3 / len(ahead) * sum(ahead)
    assert ours["means"]["loss"] == pytest.approx(main.item(), abs=1e-5)
    for k, loss in enumerate(ahead, 1):
        assert ours["means"][f"mtp_{k}_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert ours["scalar"] == pytest.approx(total.item(), abs=1e-5)
    total.backward()
    fused = {name: parameter.grad for name, parameter in oracle.named().items() if parameter.grad is not None}
    idle = []  # experts that no token chose
    for name, grad in ours["grads"].items():
        if name.endswith("e_score_correction_bias") or name in _COPIES:
            continue
        expected = _of_fused(name, fused)
        if expected.abs().max() < 1e-4:
            idle.append(name)
        torch.testing.assert_close(grad, expected, rtol=0, atol=float(1e-5 * expected.abs().max()), msg=name)
    assert len(idle) < 20 and all(".mlp.experts." in name for name in idle), "a gradient that is zero proves nothing"


_COPIES = {f"model.layers.{checks.LAYERS + k}.{name}.weight" for k in range(checks.DEPTHS) for name in ("embed_tokens", "shared_head.head")}


def _of_fused(name: str, grads: dict[str, torch.Tensor]) -> torch.Tensor:
    """A gradient by the hub's name; transformers keeps the experts of a layer in two tensors [E, 2 I, D] and [E, D, I]."""
    if name in grads:
        return grads[name]
    layer, _, rest = name.partition(".mlp.experts.")
    number, kind, _ = rest.split(".")
    if kind == "down_proj":
        return grads[f"{layer}.mlp.experts.down_proj"][int(number)]
    gate, up = grads[f"{layer}.mlp.experts.gate_up_proj"][int(number)].chunk(2)
    return gate if kind == "gate_proj" else up


def test_modules_change_nothing_where_they_are_not_asked_for(found: Any) -> None:
    assert found[2]["same without modules"]


def test_the_folder_comes_back_bitwise_with_its_copies(found: Any) -> None:
    _, saved, ours = found
    assert ours["weights"].keys() == saved.keys()
    assert [name for name in saved if not torch.equal(saved[name], ours["weights"][name])] == []
    assert _COPIES <= saved.keys()


def test_weights_that_are_missing_or_not_shared_are_refused(found: Any) -> None:
    _, saved, _ = found
    config = {**checks.FIELDS, "model_type": "deepseek_v3", "num_hidden_layers": checks.LAYERS, "rms_norm_eps": 1e-6}
    shape = model_config_from_hf(config)
    assert "mtp_num_layers" not in shape  # transformers keeps the number in config.json and drops the weights

    from megalign.config.schema import ModelConfig

    def table(depths: int | None) -> Any:
        model = ModelConfig.model_validate({**shape, "mtp_num_layers": depths})
        return family_of_model(model).conversion(Dimensions.of(model, checks.VOCAB))

    table(None).check(saved)  # modules are left out
    table(1).check(saved)  # the second one is
    table(2).check({name: value for name, value in saved.items() if name not in _COPIES})
    with pytest.raises(ConversionError, match=r"missing \(model.layers.4.eh_proj.weight"):
        table(3).check(saved)
    copy = sorted(_COPIES)[0]
    with pytest.raises(ConversionError, match="leave model.mtp_num_layers out"):
        table(2).check({**saved, copy: saved[copy] + 1})
    exported = family_of_model(table_model := ModelConfig.model_validate({**shape, "mtp_num_layers": 2})).hf_config_from_model(table_model, checks.VOCAB, "float32")
    assert exported["num_nextn_predict_layers"] == 2


def test_a_shift_crosses_no_boundary_and_no_padding() -> None:
    rows = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
    masks = [[0, 1, 0, 1, 1], [0, 1], [0, 0, 1]]
    examples = [Example(torch.tensor(row, dtype=torch.int32).numpy(), torch.tensor(mask, dtype=torch.bool).numpy()) for row, mask in zip(rows, masks)]
    batch = collate([examples], sequence_length=16, pad_id=0, document_multiple=4)  # 8 + 4 + 4
    for depth in (1, 2):
        ahead: Ahead = look_ahead(batch, depth)
        targets = {}  # position -> the token that the module of this depth must say there
        for start, row, mask in zip((0, 8, 12), rows, masks):
            for i in range(len(row) - depth - 1):
                assert ahead.tokens[start + i] == row[i + depth]
                if mask[i + depth + 1]:
                    targets[start + i] = row[i + depth + 1]
        assert {int(i): int(ahead.labels[i]) for i in ahead.loss_mask.nonzero()} == targets
        real = {start + i for start, row in zip((0, 8, 12), rows) for i in range(len(row) - depth)}
        assert set((~ahead.padding).nonzero().flatten().tolist()) == real
