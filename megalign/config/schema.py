"""Every key of a recipe: one pydantic model a section, one `Recipe` around them.

A recipe is one YAML file plus `section.key=value` overrides (see `load.py`). Keys that exist in
Megatron carry Megatron's names. Unknown keys and wrong types are refused; what no single field can
decide (layouts, batch sizes, megatron-core's own rules) is decided in `rules.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Format = Literal[
    "auto", "messages", "sharegpt", "instruction", "prompt_completion", "xlam", "text", "preference", "hh", "comparison", "ranked",
    "ultrafeedback", "helpsteer", "labelled", "unpaired", "gsm8k", "problem", "human_eval", "prompts", "judge_prompts",
]  # fmt: skip  (megalign.data.formats has the table)

TEMPLATES = ("chatml", "llama2", "llama3", "mistral-v1", "mistral-v2", "mistral-v3", "alpaca", "vicuna")  # of megalign.data.templates


class Section(BaseModel):
    """A part of the recipe: unknown keys are errors, values are validated on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, validate_default=True)


class ModelConfig(Section):
    """The transformer. `preset` fills the fields that the recipe does not give itself."""

    preset: str | None = Field(default=None, description="a name of `megalign.models.presets`; explicit keys win over it")
    init_from: str | None = Field(default=None, description="a Hugging Face folder, or a run folder of ours (its best checkpoint): it gives the shape and the weights")
    num_layers: int = Field(default=4, ge=1)
    hidden_size: int = Field(default=128, ge=1)
    ffn_hidden_size: int = Field(default=384, ge=1, description="width of the dense MLP")
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    activation_func: Literal["silu", "gelu", "gelu_tanh"] = Field(default="silu", description="gelu_tanh: its approximation by tanh (GPT-2)")
    gated_linear_unit: bool = Field(default=True, description="the MLP multiplies activation_func(gate) with a second projection: SwiGLU with silu")
    add_bias_linear: bool = Field(default=False, description="a bias in every linear layer of attention and MLP (GPT-2)")
    add_qkv_bias: bool = Field(default=False, description="a bias in the query, key and value projections alone (Qwen2)")
    num_attention_heads: int = Field(default=4, ge=1)
    num_query_groups: int | None = Field(default=None, ge=1, description="key/value heads (GQA); default: num_attention_heads")
    kv_channels: int | None = Field(default=None, ge=1, description="size of one head; default: hidden_size / num_attention_heads")
    vocab_size: int | None = Field(default=None, ge=2, description="default: that of the tokenizer; padded so that tensor parallelism divides it")
    max_position_embeddings: int = Field(default=4096, ge=1)
    position_embedding_type: Literal["rope", "learned_absolute"] = Field(default="rope", description="learned_absolute: a table of max_position_embeddings rows (GPT-2)")
    rotary_base: float = Field(default=10000.0, gt=0)
    # Rotary embeddings beyond the length that the model was trained with; rope leaves the frequencies as they are.
    rope_type: Literal["rope", "llama3", "yarn"] = Field(default="rope", description="llama3: as Llama 3.1 scales frequencies; yarn: arXiv:2309.00071")
    rotary_scaling_factor: float = Field(default=1.0, ge=1, description="longest context / original_max_position_embeddings")
    original_max_position_embeddings: int | None = Field(default=None, ge=1, description="length that the frequencies were trained with; llama3 and yarn need it")
    low_freq_factor: float = Field(default=1.0, gt=0, description="llama3: wavelengths above original length / this are scaled in full")
    high_freq_factor: float = Field(default=4.0, gt=0, description="llama3: wavelengths below original length / this are not scaled")
    beta_fast: float = Field(default=32.0, gt=0, description="yarn: turns over the original length above which nothing is scaled")
    beta_slow: float = Field(default=1.0, gt=0, description="yarn: turns below which the scale is full")
    mscale: float = Field(default=1.0, ge=0, description="yarn: weight of the temperature of the rotated parts")
    mscale_all_dim: float = Field(default=0.0, ge=0, description="yarn: weight of the temperature of all attention scores (DeepSeek)")
    layernorm_epsilon: float = Field(default=1e-5, gt=0)
    qk_layernorm: bool = Field(default=False, description="RMSNorm over each query and key head (Qwen3)")
    share_embeddings_and_output_weights: bool = Field(default=False, description="tie the output layer to the word embedding")
    init_method_std: float = Field(default=0.02, gt=0)
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    # Multi-latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values from one small latent a token.
    multi_latent_attention: bool = False
    q_lora_rank: int | None = Field(default=None, ge=1, description="width of the queries' latent; null: queries are projected directly")
    kv_lora_rank: int = Field(default=512, ge=1, description="width of the latent that keys and values share")
    qk_head_dim: int = Field(default=128, ge=1, description="part of a query and key head without position")
    qk_pos_emb_head_dim: int = Field(default=64, ge=1, description="part with rotary position; all key heads share it")
    v_head_dim: int = Field(default=128, ge=1, description="size of one value head")
    # Mixture of experts; num_moe_experts: null is a dense model.
    num_moe_experts: int | None = Field(default=None, ge=1)
    moe_ffn_hidden_size: int | None = Field(default=None, ge=1, description="width of one expert; default: ffn_hidden_size")
    moe_layer_freq: int | list[int] = Field(default=1, description="n: every n-th layer from the first has experts; or 1 (experts) and 0 (dense) for each layer")
    moe_router_topk: int = Field(default=2, ge=1)
    moe_router_score_function: Literal["softmax", "sigmoid"] = Field(default="softmax", description="sigmoid: DeepSeek-V3")
    moe_router_enable_expert_bias: bool = Field(default=False, description="balance without a loss, by a bias on the choice alone (arXiv:2408.15664); always FP32")
    moe_router_bias_update_rate: float = Field(default=1e-3, ge=0, description="what a step adds to the bias of an idle expert and takes from a busy one")
    moe_router_num_groups: int | None = Field(default=None, ge=1, description="groups of experts of which a token may choose only some")
    moe_router_group_topk: int | None = Field(default=None, ge=1, description="groups that a token may choose from")
    moe_router_topk_scaling_factor: float | None = Field(default=None, gt=0, description="what the chosen probabilities are multiplied with")
    moe_norm_topk_prob: bool = Field(default=True, description="rescale the chosen probabilities to sum 1 (Mixtral, Qwen3-MoE)")
    moe_shared_expert_intermediate_size: int | None = Field(default=None, ge=1, description="width of the always-on shared expert")
    moe_aux_loss_coeff: float = Field(default=0.0, ge=0)
    moe_z_loss_coeff: float | None = Field(default=None, ge=0)
    moe_input_jitter_eps: float | None = Field(default=None, ge=0)
    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = Field(default="alltoall", description="flex: DeepEP, where it is installed (CUDA)")
    moe_grouped_gemm: bool | None = Field(
        default=None, description="all experts of a rank in one grouped matmul of torch, or one after the other; null: grouped on CUDA where torch has it"
    )
    moe_expert_capacity_factor: float | None = Field(default=None, gt=0, description="null: no token is dropped")
    # Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): modules behind the last layer, used in training alone.
    mtp_num_layers: int | None = Field(default=None, ge=1, description="prediction modules: module k predicts the token k + 1 ahead; null: none")
    mtp_loss_scaling_factor: float = Field(default=0.1, ge=0, description="weight of the mean of their losses beside the main one")
    transformer_impl: Literal["local", "transformer_engine"] = Field(default="local", description="the layer spec; ours runs everywhere")


class ParallelConfig(Section):
    """How the model is cut over ranks, under Megatron's names."""

    tensor_model_parallel_size: int = Field(default=1, ge=1)
    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    virtual_pipeline_model_parallel_size: int | None = Field(default=None, ge=2, description="interleaved stages a pipeline rank")
    num_layers_in_first_pipeline_stage: int | None = Field(default=None, ge=1, description="uneven stages: the others share the rest evenly")
    num_layers_in_last_pipeline_stage: int | None = Field(default=None, ge=1)
    pipeline_model_parallel_layout: str | None = Field(
        default=None, min_length=2, description="stage by stage, e.g. Ettt|(tt|)*29tL: E embedding, t layer, m MTP layer, L output"
    )
    context_parallel_size: int = Field(default=1, ge=1)
    expert_model_parallel_size: int = Field(default=1, ge=1)
    expert_tensor_parallel_size: int | None = Field(default=None, ge=1, description="default: 1, experts are not cut by tensor parallelism")
    sequence_parallel: bool = False
    data_parallel_size: int | None = Field(default=None, ge=1, description="default: what the world leaves; started bare: 1")
    use_distributed_optimizer: bool = Field(default=True, description="shard FP32 masters and Adam moments over data-parallel ranks")
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    reduce_in_backward: bool = Field(default=True, description="gradients partial over tensor ranks are added up by hooks in backward; false: after it, by megatron")
    unsynchronised: list[Literal["position_embeddings", "expert_parallel"]] = Field(
        default=[], description="FOR ABLATIONS: copied parameters whose gradients are not reduced over the expert-parallel group"
    )


class TokenizerConfig(Section):
    """An existing Hugging Face or SentencePiece tokenizer (`path`), or a byte-level BPE trained on the training rows."""

    path: str | None = Field(default=None, description="folder with tokenizer.json, or a SentencePiece .model; default: that of model.init_from, else one is trained")
    vocab_size: int = Field(default=4096, ge=260, description="size of the tokenizer that is trained, special tokens included")
    special_tokens: list[str] = Field(default=[], description="a single id each wherever the text has them, e.g. <think>, </think>, <tool_call>")


class MixtureSource(Section):
    """One part of a mixture."""

    name: str = Field(min_length=1)
    path: str | list[str] = Field(description="file or files; `grammar` is the built-in toy dialogue set")
    weight: float = Field(ge=0, allow_inf_nan=False, description="share of the tokens trained on, relative to the other weights")
    kind: Literal["human", "reviewed", "synthetic", "replay"] | None = Field(default=None, description="where it comes from: shares outside the usual ranges are warned about")


class CurriculumStage(Section):
    """Weights of a mixture from a step on."""

    from_step: int = Field(ge=0)
    weights: dict[str, float] = Field(description="name of each source: its weight")


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
    max_bad_share: float = Field(default=0.01, ge=0, le=1, description="share of rows that cannot be read or rendered past which the run stops")
    shuffle: bool = True
    remainder: Literal["drop", "pad"] = Field(default="pad", description="last global batch of an epoch: pad with rows that score nothing, or drop")
    max_rows: int | None = Field(default=None, ge=1)
    balance: bool | None = Field(default=None, description="microbatches and data-parallel ranks with equally many tokens; null: where rows are not packed")
    order_by_length: bool = Field(default=False, description="curriculum: the first epoch goes from short rows to long ones")
    mixture: list[MixtureSource] | None = Field(default=None, description="several sources by weight, in the place of `train`")
    curriculum: list[CurriculumStage] | None = Field(default=None, description="other weights of the mixture from given steps on")
    streaming: bool = Field(default=False, description="tokenise while training, a window of rows at a time; needs train.max_steps")
    shuffle_window: int = Field(default=16384, ge=1, description="streaming: rows that are shuffled and packed among each other")
    cache_dir: str | None = Field(default=None, description="folder of tokenised rows, shared by all ranks and runs; default: .cache beside `output`")
    cache_timeout: float = Field(default=7200.0, gt=0, description="seconds to wait for another process that tokenises")


class OptimizerConfig(Section):
    """AdamW with FP32 masters; decoupled weight decay, none on norms and biases."""

    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    clip_grad: float = Field(default=1.0, ge=0, description="global-norm clip; 0: off")
    optimizer_cpu_offload: bool = Field(default=False, description="masters and Adam moments in host memory, and the update computed there")
    lr_decay_style: Literal["cosine", "linear", "constant", "cosine_with_restarts", "wsd"] = "cosine"
    lr_warmup_steps: int = Field(default=0, ge=0)
    min_lr: float = Field(default=0.0, ge=0)
    lr_num_cycles: int = Field(default=1, ge=1, description="cosine_with_restarts: number of restarts")
    lr_wsd_decay_steps: int | None = Field(default=None, ge=1, description="wsd: steps of the final decay; required by it")
    lr_wsd_decay_style: Literal["minus_sqrt", "linear", "cosine", "exponential"] = "minus_sqrt"
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
    recompute_granularity: Literal["full", "selective"] | None = Field(
        default=None, description="activations computed again in backward instead of kept: whole layers, or recompute_modules"
    )
    recompute_method: Literal["uniform", "block"] | None = Field(
        default=None, description="full: all layers in groups of recompute_num_layers, or the first recompute_num_layers of a stage one by one"
    )
    recompute_num_layers: int | None = Field(default=None, ge=1)
    recompute_modules: list[Literal["core_attn", "layernorm", "mlp", "moe", "shared_experts", "mla_up_proj", "moe_act"]] | None = Field(
        default=None, description="selective: these parts of every layer; default: core_attn"
    )
    eval_interval: int | None = Field(default=None, ge=1, description="steps between evaluations; null: only at the end")
    eval_rows: int | None = Field(default=None, ge=1, description="rows of validation used; null: all")
    early_stop_patience: int | None = Field(default=None, ge=1, description="evaluations without improvement after which the run stops")
    forgetting_data: str | list[str] | None = Field(default=None, description="file or files of what the model knew before: eval_old_loss, measured at every evaluation")
    forgetting_limit: float = Field(default=0.1, gt=0, description="nats by which eval_old_loss may rise above its value before the first step; past it the run stops")
    early_stop_min_delta: float = Field(default=0.0, ge=0, description="nats by which eval_loss must fall below its last mark to count as an improvement")
    save_interval: int | None = Field(default=None, ge=1, description="steps between checkpoints; null: at evaluations and the end")
    async_save: bool = Field(default=False, description="write checkpoints while training goes on; needs memory for a copy of this rank's shards")
    hang_timeout_seconds: float | None = Field(
        default=None, gt=0, description="end the run, with the stacks of all ranks, when a rank does nothing new for so long; more than the longest save; null: off"
    )
    keep_last: int = Field(default=2, ge=1)
    keep_best: int = Field(default=1, ge=0, description="checkpoints with the lowest eval_loss that are kept besides the last")
    load_best_at_end: bool = True
    nan_guard: bool = Field(default=True, description="stop on a non-finite loss or gradient with cause, parameter and microbatch")
    spike_factor: float | None = Field(default=None, gt=1, description="stop when loss exceeds this multiple of its running mean; null: off")
    freeze: list[str] = Field(
        default=[], description="parameters that keep their values: globs over global names, or dotted parts of them (router, embedding)"
    )
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="keep an FP32 moving average of the weights, v = d v + (1 - d) w each step, in checkpoints too; null: none"
    )
    eval_ema: bool = Field(default=False, description="evaluate, answer and convert with the averaged weights")
    eval_prompts: int = Field(default=0, ge=0, description="validation prompts answered greedily at every evaluation: exact match and length")
    sample_prompts: int = Field(default=3, ge=0, description="prompts answered at the end for the report")
    sample_tokens: int = Field(default=64, ge=1)
    exact_match: bool = Field(default=False, description="at the end, answer every validation prompt greedily and compare")


class LoggingConfig(Section):
    """Where results go. JSONL metrics are always written."""

    log_interval: int = Field(default=1, ge=1)
    tensorboard: bool = True
    trackers: list[Literal["wandb", "mlflow"]] = Field(default=[], description="dashboards told besides; each must be installed, and is set up by its own environment")
    timers: bool = Field(default=False, description="seconds of each phase on each rank, and which rank is slow; on CUDA it waits for the GPU at each phase")
    profile_steps: tuple[int, int] | None = Field(default=None, description="first and last step of a torch profile; a chrome trace a rank in logs/profile")
    memory_snapshot: bool = Field(default=False, description="on CUDA: a record of allocations in logs/memory when memory runs out")
    nvtx: bool = Field(default=False, description="name the phases for Nsight Systems (CUDA)")
    report: bool = True


class ReferenceConfig(Section):
    """What the policy is compared with."""

    reference: Literal["cached", "model", "base"] = Field(
        default="cached", description="cached: one pass over the data before training; model: a second model in memory; base: the model without its adapters (lora)"
    )
    reference_from: str | None = Field(default=None, description="Hugging Face folder, or run of ours, of the reference; default: what the policy starts from")
    reference_cache: str | None = Field(default=None, description="folder of the reference's log-probs, e.g. shared by runs with other betas; default: reference/ in output")


class DPOConfig(ReferenceConfig):
    """`megalign dpo`: which loss on pairs, and what it is compared with. Options left out have the loss's own default."""

    loss: Literal[
        "sigmoid", "cdpo", "robust", "ipo", "ipo_sum", "hinge", "sigmoid_norm", "rpo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
        "aot_unpaired", "apo_zero", "apo_down", "discopop", "orpo", "simpo", "cpo",
    ] = Field(default="sigmoid", description="sigmoid: DPO itself; orpo, simpo and cpo need no reference")  # fmt: skip
    beta: float | None = Field(default=None, gt=0, description="strength of the reference (orpo: lambda); default 0.1, simpo 2")
    label_smoothing: float | None = Field(default=None, ge=0, lt=1, description="cdpo, robust, exo_pair, aot: share of labels taken as flipped")
    gamma: float | None = Field(default=None, ge=0, description="simpo: margin that the chosen answer must lead by; default 1")
    nll_weight: float | None = Field(default=None, ge=0, description="rpo, cpo: weight of -log p of the chosen answer; default 1")
    reward_shift: float | None = Field(default=None, description="bco_pair: constant taken from both rewards; default 0")
    tau: float | None = Field(default=None, gt=0, description="discopop: width of the blend; default 0.05")
    share_prompt: bool = Field(default=True, description="both answers attend to one copy of their prompt, where that saves work and is exact")
    on_collapse: Literal["warn", "stop"] = Field(default="warn", description="when chosen answers become less likely while the loss falls")


class KTOConfig(ReferenceConfig):
    """`megalign kto`: which loss on answers that are labelled desirable or not."""

    loss: Literal["kto", "apo_zero_unpaired"] = Field(default="kto", description="apo_zero_unpaired: KTO without its baseline")
    beta: float = Field(default=0.1, gt=0, description="strength of the reference")
    desirable_weight: float = Field(default=1.0, ge=0, description="of the loss of desirable answers; raise it where they are few")
    undesirable_weight: float = Field(default=1.0, ge=0, description="of the loss of the others")


class LoraConfig(Section):
    """Low-rank adapters beside frozen weights (arXiv:2106.09685). PEFT's r, lora_alpha and lora_dropout are understood too."""

    rank: int | None = Field(default=None, ge=1, description="columns of an adapter; null: no adapters, all weights are trained")
    alpha: float | None = Field(default=None, gt=0, description="what adapters add is multiplied with alpha / rank; default 2 rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on the input of the adapters")
    target_modules: str | list[str] = Field(default="all-linear", description="all-linear, or some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, ...")
    use_rslora: bool = Field(default=False, description="alpha / sqrt(rank) in the place of alpha / rank (arXiv:2312.03732)")
    modules_to_save: list[str] = Field(default=[], description="parameters trained as a whole beside the adapters: names as train.freeze takes them")

    @model_validator(mode="before")
    @classmethod
    def _peft_names(cls, data: Any) -> Any:
        spelt = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
        if isinstance(data, dict):  # a key given in both spellings stays, and is refused
            return {spelt[key] if key in spelt and spelt[key] not in data else key: value for key, value in data.items()}
        return data


class SamplingConfig(Section):
    """Answers drawn from a model."""

    n: int = Field(default=1, ge=1, description="answers to each prompt")
    prompts: int | None = Field(default=None, ge=1, description="prompts used: the first so many of data.train; null: all")
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=128, ge=1, description="an answer that is longer is never chosen")


class RewardJudgeConfig(Section):
    """A trained reward model, or several, that score answers."""

    checkpoints: str | list[str] | None = Field(default=None, description="run of megalign rm train, or one of its checkpoints; several are an ensemble")
    head: str | None = Field(default=None, description="head that scores, the larger the better; null: the only one there is")
    alpha: float = Field(default=1.0, ge=0, description="of an ensemble: mean - alpha * standard deviation of its members' normalised rewards")
    max_tokens: int | None = Field(default=None, ge=2, description="tokens that a prompt with an answer may have; null: what the reward model was trained with")
    parallel: ParallelConfig | None = Field(default=None, description="the layout that the reward model runs on; null: the policy's")


class ScoredConfig(SamplingConfig):
    """And what judges them."""

    n: int = Field(default=16, ge=2, description="answers to each prompt")
    scorer: str = Field(default="exact_match", description="exact_match, words_in_place, reward_model, or module:function with (row, answer) -> number, the larger the better")
    reward_model: RewardJudgeConfig = RewardJudgeConfig()


class BestOfNConfig(ScoredConfig):
    """`megalign best-of-n`: draw, keep the best, imitate it, and again."""

    rounds: int = Field(default=1, ge=1)
    min_score: float | None = Field(default=None, description="the best answer to a prompt is not imitated where its score is below; null: always")


class RSOConfig(ScoredConfig):
    """`megalign rso`: pairs for `megalign dpo` from statistical rejection sampling."""

    n: int = Field(default=64, ge=2, description="answers to each prompt")
    beta: float = Field(default=0.5, gt=0, description="accepted answers are distributed as pi(y) exp(score / beta)")
    accepted: int = Field(default=8, ge=2, description="accepted answers of a prompt that are used, two by two")


class RoundsConfig(ScoredConfig):
    """`megalign dpo` in rounds: the policy's own answers, ranked, are its next pairs, and it is the next reference."""

    count: int | None = Field(default=None, ge=1, description="rounds; null: learn from the pairs of data.train")
    n: int = Field(default=4, ge=2, description="answers to each prompt: the best and the worst are a pair")
    prompts: int | None = Field(default=None, ge=1, description="prompts of a round: the next so many of data.train's conversations; null: all")


class HeadConfig(Section):
    """One number that a reward model learns to say of an answer."""

    loss: Literal["bradley_terry", "regression", "binary", "classification", "ordinal", "exponential", "weibull"] = Field(
        default="bradley_terry", description="pairs; a number; yes or no; one of `classes`; a rating 0 to classes - 1; a time, part of them censored"
    )
    label: str | None = Field(default=None, min_length=1, description="key of a row's labels; default: the name of the head")
    weight: float = Field(default=1.0, ge=0, description="of its mean loss in the sum over heads")
    classes: int | None = Field(default=None, ge=2, description="classification, ordinal: how many")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="bradley_terry: share of pairs taken as flipped; classification: spread over all classes")
    margin: float = Field(default=0.0, ge=0, description="bradley_terry: times a row's own margin, what the chosen answer must lead by")
    centering: float = Field(default=0.0, ge=0, description="bradley_terry: weight of (r_chosen + r_rejected)^2; TRL's center_rewards_coefficient")
    scale: Literal["linear", "log1p"] = Field(default="linear", description="regression: of the labels; log1p for counts (turns to come)")
    within: float | None = Field(default=None, gt=0, description="binary: the label is a time, and true where the event came within this; unknown where it was censored before")


class RewardConfig(Section):
    """`megalign rm train`: the heads of a reward model, each with its loss and its labels."""

    heads: dict[str, HeadConfig] = Field(default={"reward": HeadConfig()}, description="name: {loss, label, weight, ...}")
    bootstrap: int = Field(default=1000, ge=100, description="resamples of the held-out rows for intervals that have no formula")


class DistillConfig(Section):
    """`megalign distill`: who teaches, and what is learnt."""

    teacher: str | None = Field(default=None, description="a run of ours, or a Hugging Face folder")
    mode: Literal["model", "cached", "sequence"] = Field(
        default="model", description="model: a second model in memory; cached: its most probable tokens, kept by one pass; sequence: its answers are imitated"
    )
    loss: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = Field(default="forward_kl", description="model: KL(teacher || student), KL(student || teacher), or between them")
    beta: float = Field(default=0.5, gt=0, lt=1, description="jensen_shannon: the teacher's share in the mixture")
    temperature: float = Field(default=1.0, gt=0, description="of both models")
    ce_weight: float = Field(default=0.0, ge=0, description="weight of the cross-entropy of the data's own tokens, which is added")
    teacher_top_k: int = Field(default=64, ge=1, description="cached: tokens kept")
    teacher_cache: str | None = Field(default=None, description="cached: folder of what is kept; default: teacher/ in output")
    teacher_parallel: ParallelConfig | None = Field(default=None, description="cached, sequence: the layout that the teacher runs on; default: the student's")
    samples: SamplingConfig = SamplingConfig()
    replay: str | list[str] | None = Field(default=None, description="file or files of earlier data, a source of a mixture beside data.train")
    replay_share: float = Field(default=0.1, gt=0, lt=1, description="share of the tokens that come from replay")


class AuditConfig(Section):
    """Whether all copies of a parameter are, and stay, equal (docs/replicated-gradients.md)."""

    interval: int | None = Field(default=100, ge=1, description="steps between comparisons of weights, gradients, buffers and moments; null: never")
    on_failure: Literal["warn", "stop", "repair"] = Field(default="warn", description="repair: every copy gets the values of the first rank that holds it")
    probe: bool = Field(default=False, description="before the first step, compare gradients with differences of the loss, in FP64 on a copy of the model")


class KernelsConfig(Section):
    """Which implementation FP8 operations take; `megalign kernels` prints what a machine has and takes (kernels/README.md)."""

    fp8_backend: Literal["auto", "reference", "triton", "scaled_mm", "gluon"] = Field(
        default="auto", description="auto: the fastest of each shape, measured once; else this one, and the next below where it lacks an operation"
    )


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
    dpo: DPOConfig = DPOConfig()
    kto: KTOConfig = KTOConfig()
    lora: LoraConfig = LoraConfig()
    best_of_n: BestOfNConfig = BestOfNConfig()
    rso: RSOConfig = RSOConfig()
    rounds: RoundsConfig = RoundsConfig()
    rm: RewardConfig = RewardConfig()
    distill: DistillConfig = DistillConfig()
    audit: AuditConfig = AuditConfig()
    kernels: KernelsConfig = KernelsConfig()
    logging: LoggingConfig = LoggingConfig()
