"""Every key of a recipe: one pydantic model a section, one `Recipe` around them.

A recipe is one YAML file plus `section.key=value` overrides (see `load.py`). Keys that exist in
Megatron carry Megatron's names. Unknown keys and wrong types are refused; what no single field can
decide (layouts, batch sizes, megatron-core's own rules) is decided in `rules.py`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Format = Literal[
    "auto", "messages", "sharegpt", "instruction", "prompt_completion", "xlam", "text", "preference", "hh", "comparison", "ranked",
    "ultrafeedback", "helpsteer", "unpaired", "gsm8k", "problem", "human_eval", "prompts", "judge_prompts",
]  # fmt: skip  (megalign.data.formats has the table)

TEMPLATES = ("chatml", "llama2", "llama3", "mistral-v1", "mistral-v2", "mistral-v3", "alpaca", "vicuna")  # of megalign.data.templates


class Section(BaseModel):
    """A part of the recipe: unknown keys are errors, values are validated on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, validate_default=True)


class ModelConfig(Section):
    """The transformer. `preset` fills the fields that the recipe does not give itself."""

    preset: str | None = Field(default=None, description="a name of `megalign.models.presets`; explicit keys win over it")
    init_from: str | None = Field(default=None, description="a Hugging Face folder: its config.json gives the shape, its safetensors the weights")
    num_layers: int = Field(default=4, ge=1)
    hidden_size: int = Field(default=128, ge=1)
    ffn_hidden_size: int = Field(default=384, ge=1, description="width of the dense SwiGLU MLP")
    num_attention_heads: int = Field(default=4, ge=1)
    num_query_groups: int | None = Field(default=None, ge=1, description="key/value heads (GQA); default: num_attention_heads")
    kv_channels: int | None = Field(default=None, ge=1, description="size of one head; default: hidden_size / num_attention_heads")
    vocab_size: int | None = Field(default=None, ge=2, description="default: that of the tokenizer; padded so that tensor parallelism divides it")
    max_position_embeddings: int = Field(default=4096, ge=1)
    position_embedding_type: Literal["rope"] = "rope"
    rotary_base: float = Field(default=10000.0, gt=0)
    layernorm_epsilon: float = Field(default=1e-5, gt=0)
    qk_layernorm: bool = Field(default=False, description="RMSNorm over each query and key head (Qwen3)")
    share_embeddings_and_output_weights: bool = Field(default=False, description="tie the output layer to the word embedding")
    init_method_std: float = Field(default=0.02, gt=0)
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    # Mixture of experts; num_moe_experts: null is a dense model.
    num_moe_experts: int | None = Field(default=None, ge=1)
    moe_ffn_hidden_size: int | None = Field(default=None, ge=1, description="width of one expert; default: ffn_hidden_size")
    moe_router_topk: int = Field(default=2, ge=1)
    moe_norm_topk_prob: bool = Field(default=True, description="rescale the chosen probabilities to sum 1 (Mixtral, Qwen3-MoE)")
    moe_shared_expert_intermediate_size: int | None = Field(default=None, ge=1, description="width of the always-on shared expert")
    moe_aux_loss_coeff: float = Field(default=0.0, ge=0)
    moe_z_loss_coeff: float | None = Field(default=None, ge=0)
    moe_input_jitter_eps: float | None = Field(default=None, ge=0)
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    moe_expert_capacity_factor: float | None = Field(default=None, gt=0, description="null: no token is dropped")
    transformer_impl: Literal["local", "transformer_engine"] = Field(default="local", description="the layer spec; ours runs everywhere")


class ParallelConfig(Section):
    """How the model is cut over ranks, under Megatron's names."""

    tensor_model_parallel_size: int = Field(default=1, ge=1)
    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    virtual_pipeline_model_parallel_size: int | None = Field(default=None, ge=2, description="interleaved stages a pipeline rank")
    context_parallel_size: int = Field(default=1, ge=1)
    expert_model_parallel_size: int = Field(default=1, ge=1)
    expert_tensor_parallel_size: int | None = Field(default=None, ge=1, description="default: 1, experts are not cut by tensor parallelism")
    sequence_parallel: bool = False
    data_parallel_size: int | None = Field(default=None, ge=1, description="default: what the world leaves; started bare: 1")
    use_distributed_optimizer: bool = Field(default=True, description="shard FP32 masters and Adam moments over data-parallel ranks")
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


class TokenizerConfig(Section):
    """An existing Hugging Face or SentencePiece tokenizer (`path`), or a byte-level BPE trained on the training rows."""

    path: str | None = Field(default=None, description="folder with tokenizer.json, or a SentencePiece .model; default: that of model.init_from, else one is trained")
    vocab_size: int = Field(default=4096, ge=260, description="size of the tokenizer that is trained, special tokens included")
    special_tokens: list[str] = Field(default=[], description="a single id each wherever the text has them, e.g. <think>, </think>, <tool_call>")


class DataConfig(Section):
    """What is read, how it is rendered, and which tokens are scored."""

    train: str | list[str] = Field(default="grammar", description="file or files; `grammar` is the built-in toy dialogue set")
    validation: str | list[str] | None = Field(default=None, description="file or files; null: the last `validation_rows` of train")
    validation_rows: int = Field(default=100, ge=0)
    format: Format = Field(default="auto", description="of every file of train and validation; auto: told by its first row")
    template: str = Field(default="chatml", description="chatml, llama2, llama3, mistral-v1, -v2, -v3, alpaca, vicuna, a .jinja file, or tokenizer: its own")
    tokenizer: TokenizerConfig = TokenizerConfig()
    sequence_length: int = Field(default=256, ge=8, description="tokens of one (packed) row")
    packing: bool = Field(default=True, description="several conversations a row, attention block-diagonal, positions reset")
    loss_on: Literal["assistant", "completion", "all"] = Field(default="assistant", description="completion: the last assistant turn only; all: every token")
    truncation: Literal["turn", "drop", "error"] = Field(default="turn", description="rows too long: cut at a turn boundary, drop, or stop")
    max_bad_share: float = Field(default=0.01, ge=0, le=1, description="share of unreadable rows past which the run stops")
    shuffle: bool = True
    remainder: Literal["drop", "pad"] = Field(default="pad", description="last global batch of an epoch: pad with rows that score nothing, or drop")
    max_rows: int | None = Field(default=None, ge=1)


class OptimizerConfig(Section):
    """AdamW with FP32 masters; decoupled weight decay, none on norms and biases."""

    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    clip_grad: float = Field(default=1.0, ge=0, description="global-norm clip; 0: off")
    lr_decay_style: Literal["cosine", "linear", "constant", "cosine_with_restarts"] = "cosine"
    lr_warmup_steps: int = Field(default=0, ge=0)
    min_lr: float = Field(default=0.0, ge=0)
    lr_num_cycles: int = Field(default=1, ge=1, description="cosine_with_restarts: number of restarts")
    scale_lr_with_data_parallel: Literal["none", "linear", "sqrt"] = "none"


class TrainConfig(Section):
    """Batch, length of the run, evaluation, checkpoints, guards."""

    micro_batch_size: int = Field(default=1, ge=1)
    global_batch_size: int = Field(default=8, ge=1, description="rows a step over all data-parallel ranks and microbatches")
    max_steps: int | None = Field(default=None, ge=1, description="optimizer steps; null: `epochs` decides")
    epochs: float = Field(default=1.0, gt=0)
    max_minutes: float | None = Field(default=None, gt=0, description="stop (with a checkpoint) after this wall time")
    stop_at_step: int | None = Field(default=None, ge=1, description="stop after this step though the schedule is longer; resume continues")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="dtype of parameters and activations; masters and gradients stay FP32")
    seed: int = 1234
    eval_interval: int | None = Field(default=None, ge=1, description="steps between evaluations; null: only at the end")
    eval_rows: int | None = Field(default=None, ge=1, description="rows of validation used; null: all")
    early_stop_patience: int | None = Field(default=None, ge=1, description="evaluations without improvement after which the run stops")
    early_stop_min_delta: float = Field(default=0.0, ge=0, description="nats by which eval_loss must fall below its last mark to count as an improvement")
    save_interval: int | None = Field(default=None, ge=1, description="steps between checkpoints; null: at evaluations and the end")
    keep_last: int = Field(default=2, ge=1)
    keep_best: int = Field(default=1, ge=0, description="checkpoints with the lowest eval_loss that are kept besides the last")
    load_best_at_end: bool = True
    nan_guard: bool = Field(default=True, description="stop on a non-finite loss or gradient with cause, parameter and microbatch")
    spike_factor: float | None = Field(default=None, gt=1, description="stop when loss exceeds this multiple of its running mean; null: off")
    sample_prompts: int = Field(default=3, ge=0, description="prompts answered at the end for the report")
    sample_tokens: int = Field(default=64, ge=1)
    exact_match: bool = Field(default=False, description="at the end, answer every validation prompt greedily and compare")


class LoggingConfig(Section):
    """Where results go. JSONL metrics are always written."""

    log_interval: int = Field(default=1, ge=1)
    tensorboard: bool = True
    report: bool = True


class Recipe(Section):
    """One run."""

    name: str = "run"
    output: str = Field(default="runs/run", description="folder of the run; a finished one is never overwritten silently")
    resume: bool = Field(default=True, description="continue from the last complete checkpoint in `output`")
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    logging: LoggingConfig = LoggingConfig()
