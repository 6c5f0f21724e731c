"""DeepSeek-V3 with prediction modules: a Hugging Face folder of transformers' layers, and ours loaded from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB, LAYERS, DEPTHS = 51, 2, 2
DOCUMENTS = (13, 2, 20, 3)  # two are so short that the second module has nothing to say about them
FIELDS: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 8, "num_key_value_heads": 8,
    "max_position_embeddings": 64, "initializer_range": 0.1, "eos_token_id": None, "bos_token_id": None, "q_lora_rank": 24,
    "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
}  # fmt: skip


def documents() -> list[tuple[Tensor, Tensor]]:
    """(tokens, scored): about half of the tokens but the first."""
    numbers = torch.Generator().manual_seed(5)
    found = []
    for length in DOCUMENTS:
        scored = torch.rand(length, generator=numbers) < 0.6
        scored[0], scored[-1] = False, True
        found.append((torch.randint(0, VOCAB, (length,), generator=numbers), scored))
    return found


class Oracle:
    """transformers' decoder layers, the last `DEPTHS` of them inside modules that are written out here."""

    def __init__(self) -> None:
        import transformers

        torch.manual_seed(11)
        config = transformers.DeepseekV3Config(**FIELDS, num_hidden_layers=LAYERS + DEPTHS)
        self.inner: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        self.extra: dict[str, Any] = {}
        for k in range(DEPTHS):
            for name, shape in (("enorm", (48,)), ("hnorm", (48,)), ("eh_proj", (48, 96)), ("shared_head.norm", (48,))):
                self.extra[f"{LAYERS + k}:{name}"] = torch.nn.Parameter(torch.randn(shape) * 0.1)
        with torch.no_grad():
            for parameter in [*self.inner.parameters(), *self.extra.values()]:
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5)
            for name, buffer in self.inner.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.uniform_(-0.2, 0.2)

    def losses(self) -> list[Tensor]:
        """Mean cross-entropy of the model and of each module over the scored tokens of all documents."""
        sums, counts = [0.0] * (1 + DEPTHS), [0] * (1 + DEPTHS)
        for tokens, scored in documents():
            hidden = self._norm(self._layers(self.inner.model.embed_tokens(tokens[None]), range(LAYERS)), self.inner.model.norm.weight)
            for k in range(1 + DEPTHS):
                if k:  # h^k_i from h^(k-1)_i and the embedding of token i + k
                    layer = LAYERS + k - 1
                    known = len(tokens) - k
                    if known <= 0:
                        break
                    ahead = self._norm(self.inner.model.embed_tokens(tokens[None, k:]), self.extra[f"{layer}:enorm"])
                    joined = torch.cat([ahead, self._norm(hidden[:, :known], self.extra[f"{layer}:hnorm"])], dim=-1)
                    hidden = self._layers(joined @ self.extra[f"{layer}:eh_proj"].t(), [layer])
                    hidden = self._norm(hidden, self.extra[f"{layer}:shared_head.norm"])
                for i in range(len(tokens) - k - 1):
                    if scored[i + k + 1]:
                        sums[k] = sums[k] - self.inner.lm_head(hidden[0, i]).log_softmax(-1)[tokens[i + k + 1]]
                        counts[k] += 1
        return [total / count for total, count in zip(sums, counts)]  # pyright: ignore[reportReturnType]

    def _layers(self, hidden: Tensor, numbers: Any) -> Tensor:
        n = hidden.shape[1]
        mask = torch.full((1, 1, n, n), float("-inf")).triu(1)
        positions = torch.arange(n)[None]
        rotary = self.inner.model.rotary_emb(hidden, positions)
        for number in numbers:
            out = self.inner.model.layers[number](hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    @staticmethod
    def _norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def named(self) -> dict[str, Any]:
        """Every parameter and bias under the hub's names, the shared ones once."""
        inner = {name: parameter for name, parameter in self.inner.named_parameters()}
        biases = {name: buffer for name, buffer in self.inner.named_buffers() if name.endswith("e_score_correction_bias")}
        extra = {f"model.layers.{key.replace(':', '.')}.weight": parameter for key, parameter in self.extra.items()}
        return {**inner, **biases, **extra}

    def save(self, folder: Path) -> dict[str, Tensor]:
        """Write the folder as DeepSeek publishes it: experts one by one, each module with its copies of embedding and head."""
        import transformers

        folder.mkdir()
        self.inner.save_pretrained(folder / "layers")  # splits what transformers keeps fused
        from safetensors.torch import load_file

        weights = load_file(folder / "layers" / "model.safetensors")
        weights |= {name: value.detach().clone() for name, value in self.named().items() if name not in weights and "experts" not in name}
        for k in range(DEPTHS):
            weights[f"model.layers.{LAYERS + k}.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
            weights[f"model.layers.{LAYERS + k}.shared_head.head.weight"] = weights["lm_head.weight"].clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = transformers.DeepseekV3Config(**FIELDS, num_hidden_layers=LAYERS).to_dict()
        config |= {"num_nextn_predict_layers": DEPTHS, "architectures": ["DeepseekV3ForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(config, default=str))
        return weights


def _gradient(parameter: Any) -> Any:
    return parameter.grad


def ours(folder: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """Load the folder, run the packed documents through the engine's objective; losses, HF gradients, HF weights."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megalign.batch import collate
    from megalign.config.schema import ModelConfig
    from megalign.data.rows import Example
    from megalign.losses import cross_entropy_loss
    from megalign.models.build import build_chunks
    from megalign.models.forward import logprobs_ahead, scored_logprobs
    from megalign.models.hf.io import read_hf
    from megalign.models.hf.registry import family_of_model, model_config_from_hf
    from megalign.models.hf.table import Dimensions
    from megalign.models.pretrained import load_pretrained
    from megalign.models.weights import stream_full
    from megalign.parallel.grid import create_grid
    from megalign.trainer.objective import denominators, scalar_and_sums, scored_tokens

    grid = create_grid(**layout)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    shape = model_config_from_hf(read_hf(folder).config)
    model = ModelConfig.model_validate({**shape, "init_from": str(folder), "mtp_num_layers": DEPTHS, "mtp_loss_scaling_factor": 0.3})
    chunks = build_chunks(model, grid, VOCAB, sequence_parallel=grid.tensor.size > 1)
    load_pretrained(chunks, model, grid, VOCAB)
    table = family_of_model(model).conversion(Dimensions.of(model, VOCAB, chunks[0].vocab_size))
    examples = [Example(tokens.numpy().astype("int32"), scored.numpy()) for tokens, scored in documents()]
    batch = collate([examples], sequence_length=sum(DOCUMENTS) + 2, pad_id=0)  # two tokens of padding
    counts = denominators([batch], scored_tokens, DEPTHS, grid)
    outputs = logprobs_ahead(chunks[0], batch, grid, DEPTHS)
    scalar, metrics = scalar_and_sums(cross_entropy_loss(*outputs[0]), outputs[1:], counts, model.mtp_loss_scaling_factor, 1, grid)
    scalar.backward()
    without = [(name, torch.zeros(8)) for name in table.megatron_names if name.endswith("expert_bias")]
    chunks[0].eval()
    with torch.no_grad():
        evaluated = scored_logprobs(chunks[0], batch, grid)
    return {
        "scalar": scalar.item(),
        "means": {name: value.item() / counts.tokens for name, value in metrics.items()},
        "same without modules": torch.equal(evaluated, outputs[0]),
        "grads": dict(table.to_hf([*stream_full(chunks, grid, value=_gradient), *without])),
        "weights": {name: value.clone() for name, value in table.to_hf(stream_full(chunks, grid))},
    }
