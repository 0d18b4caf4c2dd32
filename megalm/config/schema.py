"""What the user may say: one frozen pydantic class per section of the JSON file.

Every fact is stated once; what follows from these facts (dp, accumulation steps, padded vocabulary, layers per stage, DeepSpeed's
own JSON) belongs to megalm.plan and megalm.engine. Checks that span several keys are in checks.py.
"""
from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationInfo, field_validator

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NaturalFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Backend = Literal["auto", "megalm", "torch", "apex", "flash_attn", "liger", "reference"]


class Section(BaseModel):
    """Strict: "4" is not 4 and true is not 1. Sequences come as JSON lists and are kept as tuples."""
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", serialize_by_alias=True, use_attribute_docstrings=True)


class LinearScaling(Section):
    """Positions divided by a factor (position interpolation, Chen et al. 2023)."""
    type: Literal["linear"]
    """Positions divided by factor."""
    factor: Annotated[float, Field(ge=1.0, allow_inf_nan=False)]
    """How many times longer the sequences are."""


class Llama3Scaling(Section):
    """The frequency-dependent scaling of Llama 3.1."""
    type: Literal["llama3"]
    """Low frequencies divided by factor, high ones kept, those between blended."""
    factor: Annotated[float, Field(ge=1.0, allow_inf_nan=False)]
    """How many times longer the sequences are."""
    low_freq_factor: PositiveFloat
    """Wavelengths above original_seq_length / this are divided."""
    high_freq_factor: PositiveFloat
    """Wavelengths below original_seq_length / this are kept."""
    original_seq_length: Positive
    """The length the model was first trained with."""


class Model(Section):
    """The Transformer."""
    family: Literal["gpt"] = "gpt"
    """The decoder family; "gpt" spans GPT-2/3 and Llama."""
    num_layers: Positive
    """Transformer layers."""
    hidden_size: Positive
    """Width of the residual stream."""
    num_attention_heads: Positive
    """Query heads."""
    head_dim: Positive | None = Field(None, validate_default=True)
    """Elements of one attention head; default: hidden_size / num_attention_heads, which must then be whole."""
    num_query_groups: Positive | None = Field(None, validate_default=True)
    """Key/value heads (GQA); default: as many as query heads, 1 is MQA."""
    activation: Literal["gelu", "gelu_exact", "swiglu", "geglu"] = "gelu"
    """gelu is the tanh form, as GPT-2 and Megatron have it, gelu_exact has erf; swiglu and geglu multiply silu, or gelu, by
    a second projection."""
    ffn_hidden_size: Positive | None = Field(None, validate_default=True)
    """Width of the MLP; default: 4 hidden_size without a gate, 8/3 hidden_size rounded up to a multiple of 64 for the others."""
    seq_length: Positive
    """Tokens a sample."""
    normalization: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """The norm before attention, MLP and head."""
    position_embedding: Literal["learned", "rotary"] = "learned"
    """Learned absolute positions, or rotations of queries and keys."""
    tie_embeddings: bool = True
    """The output projection shares the word embedding's weight."""
    vocab_size: Positive | None = None
    """Default: the tokenizer's."""
    vocab_multiple: Positive = 128
    """The vocabulary is padded to a multiple of this; tp must divide it, so that the padding doesn't depend on tp."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance."""
    bias: bool = True
    """Biases of the linear layers."""
    qkv_bias: bool | None = Field(None, validate_default=True)
    """Biases of query, key and value; default: as bias."""
    mlp_bias: bool | None = Field(None, validate_default=True)
    """Biases of the MLP; default: as bias."""
    qk_norm: bool = False
    """Norms over head_dim on queries and keys."""
    parallel_residual: bool = False
    """Attention and MLP both read the layer's input, and both outputs are added to it (GPT-J, GPT-NeoX)."""
    sliding_window: Positive | None = None
    """Keys that a query sees, its own included (Mistral); default: all before it."""
    dropout: Probability = 0.0
    """Probability of dropping an element of the embedding, attention and MLP outputs."""
    attention_dropout: Probability = 0.0
    """Probability of dropping an attention weight."""
    rotary_theta: PositiveFloat = 10000.0
    """Base of the rotary wavelengths."""
    rotary_fraction: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] = 1.0
    """Share of a head's elements that is rotated, the first ones (GPT-NeoX); rounded down to a whole number."""
    rotary_scaling: Annotated[LinearScaling | Llama3Scaling, Field(discriminator="type")] | None = None
    """Stretches rotary positions to longer sequences; default: not at all."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""

    @field_validator("num_query_groups")
    @classmethod
    def _as_many_groups_as_heads(cls, groups: int | None, info: ValidationInfo) -> int | None:
        return info.data.get("num_attention_heads") if groups is None else groups

    @field_validator("head_dim")
    @classmethod
    def _usual_head(cls, size: int | None, info: ValidationInfo) -> int | None:
        hidden, heads = info.data.get("hidden_size"), info.data.get("num_attention_heads")
        return max(1, hidden // heads) if size is None and hidden and heads else size

    @field_validator("qkv_bias", "mlp_bias")
    @classmethod
    def _as_the_others(cls, bias: bool | None, info: ValidationInfo) -> bool | None:
        return info.data.get("bias") if bias is None else bias

    @field_validator("ffn_hidden_size")
    @classmethod
    def _usual_ffn(cls, ffn: int | None, info: ValidationInfo) -> int | None:
        hidden = info.data.get("hidden_size")
        if ffn is not None or hidden is None:
            return ffn
        return 4 * hidden if info.data.get("activation") in ("gelu", "gelu_exact") else -(-8 * hidden // (3 * 64)) * 64

    @property
    def rotary_dim(self) -> int:
        """Elements of one head that are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def gated(self) -> bool:
        """Whether the MLP has two projections side by side, gate and up."""
        return self.activation in ("swiglu", "geglu")


class Parallel(Section):
    """How the model and the batch are split over ranks."""
    tp: Positive = 1
    """Tensor parallel degree."""
    pp: Positive = 1
    """Pipeline stages."""
    dp: Positive | Literal["auto"] = "auto"
    """Data parallel replicas; auto: world size / (tp pp)."""
    sequence_parallel: bool = False
    """Norms, dropout and the residual stream hold seq_length/tp tokens a rank; no effect at tp 1."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """What data parallel replicas share: 1 optimizer state, 2 and gradients, 3 and weights (2 and 3 need pp 1)."""
    stages: Annotated[tuple[Positive, ...], Strict(False)] | None = None
    """Transformer layers of each stage; default: balanced by cost, embedding and head counted."""
    schedule: Literal["1f1b"] = "1f1b"
    """The pipeline schedule."""


class Batch(Section):
    """Sequences a step; accumulation steps follow: global / (micro dp)."""
    micro: Positive
    """Sequences in one forward pass of one replica."""
    global_: Positive = Field(alias="global")
    """Sequences in one optimizer step, over all replicas."""


class Precision(Section):
    """Numbers of the forward and backward pass."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of weights and activations; bf16 and fp16 keep fp32 master weights, bf16 accumulates gradients in fp32."""


class Recompute(Section):
    """What the backward pass computes again rather than keeps."""
    mode: Literal["none", "selective", "full"] = "none"
    """selective recomputes attention's core where its backend keeps scores of s x s (a fused one doesn't), full each layer."""


class Optimizer(Section):
    """How weights follow gradients."""
    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW (Loshchilov and Hutter 2019), or SGD with momentum."""
    lr: PositiveFloat
    """Peak learning rate."""
    betas: Annotated[tuple[Probability, Probability], Strict(False)] = (0.9, 0.95)
    """Decay of AdamW's two moments."""
    eps: PositiveFloat = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: NaturalFloat = 0.1
    """On parameters of two or more dims."""
    clip_grad_norm: NaturalFloat = 1.0
    """Bound of the global gradient norm; 0: no clipping."""
    momentum: Probability = 0.0
    """Of sgd."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)] | None = None
    """Keep an exponential moving average of the weights on the host, with this decay a step; default: none."""
    impl: Literal["auto", "torch", "deepspeed", "apex"] = "auto"
    """Whose implementation: auto takes the fastest that this machine has built; a named one that can't serve is an error."""


class Schedule(Section):
    """The learning rate as a function of the step."""
    warmup_steps: Natural = 0
    """Steps from 0 to the peak, linearly."""
    decay: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """From the peak to min_lr; wsd stays at the peak until a final linear decay."""
    min_lr: NaturalFloat = 0.0
    """The rate after the decay."""
    decay_steps: Positive | None = None
    """Default: all steps after the warm-up; for wsd the length of the final decay, 10% of train.steps."""


class Tokenizer(Section):
    """The tokenizer that the data was made with."""
    type: Literal["sentencepiece", "huggingface", "bytes"]
    """A sentencepiece model, a Hugging Face tokenizer.json, or the bytes of UTF-8."""
    path: Text | None = None
    """The sentencepiece model or tokenizer.json; bytes has none."""
    eod: Text | None = None
    """The token that ends a document, by its text: of a tokenizer.json, or in place of a sentencepiece model's own."""


class Source(Section):
    """One tokenized data set."""
    path: Text
    """A prefix: data/wiki is data/wiki.bin and data/wiki.idx."""
    weight: PositiveFloat = 1.0
    """Share of the blend, relative to the other sources."""


class Data(Section):
    """What is learned from, and what is evaluated on."""
    train: Annotated[tuple[Source, ...], Strict(False), Field(min_length=1)]
    """The data sets to learn from, blended by weight."""
    valid: Annotated[tuple[Source, ...], Strict(False)] = ()
    """The data sets to evaluate on."""
    seed: Natural | None = None
    """Of the order of samples; default: train.seed."""
    mask_eod: bool = False
    """Leave what follows an end-of-document token, another document, out of the loss (Megatron-LM: --eod-mask-loss)."""
    document_mask: bool = False
    """No token attends to another document, by the index's boundaries (Megatron-LM: --reset-attention-mask, by tokens)."""
    reset_positions: bool = False
    """Positions, learned or rotary, count from 0 in each document (Megatron-LM: --reset-position-ids)."""
    cache: Text | None = None
    """Folder of the sample indices; default: beside the data, else train.dir."""


class Kernels(Section):
    """The backend of each operation: auto takes the fastest one that serves; a named one that can't serve is an error."""
    attention: Backend = "auto"
    """Scores, softmax and context."""
    softmax: Backend = "auto"
    """The softmax of scores, where attention is megalm's and it has no kernel of the whole (fp32, other head dims)."""
    norm: Backend = "auto"
    """LayerNorm and RMSNorm."""
    rotary: Backend = "auto"
    """Rotation of queries and keys."""
    activation: Backend = "auto"
    """GELU, SwiGLU and GEGLU."""
    dropout: Backend = "auto"
    """Dropout of hidden states, with the addition to the residual stream."""
    cross_entropy: Backend = "auto"
    """The loss from logits."""


class Train(Section):
    """The run."""
    dir: Text
    """The run's folder."""
    steps: Positive
    """Optimizer steps of the whole run."""
    seed: Natural = 1234
    """Of initial weights and dropout."""
    eval_every: Natural = 0
    """Steps between evaluations; 0: never."""
    eval_samples: Positive = 64
    """Sequences in one evaluation."""
    stop_at: Positive | None = None
    """Leave after this step as an interruption would: checkpoint written, schedules untouched."""
    max_bad_steps: Positive = 5
    """Stop after so many steps in a row with a loss or gradient that isn't finite."""
    compile: bool = False
    """torch.compile each layer."""
    deterministic: bool = True
    """Sum attention's gradients in a fixed order, so that a repeated or resumed run is bitwise the same, whatever the backend. On
    a GPU false is faster: with torch's own attention above all, which then may take cuDNN's kernels; they have no such order."""
    attention_fp8: bool = False
    """Attention's forward pass multiplies in 8 bits (e4m3), the backward pass as ever: megalm's kernels on a Hopper GPU, with
    head_dim 64, 128 or 256 and without attention dropout, or kernels.attention "reference", which emulates it. Evaluations and
    generation don't. Scores of some tens, which rounding moves by more than one, want model.qk_norm."""
    z_loss: NaturalFloat = 0.0
    """Times the square of each token's log-sum-exp, added to its loss (Chowdhery et al. 2022); evaluations leave it out."""
    label_smoothing: Probability = 0.0
    """Share of a target's probability that is spread over the vocabulary (Szegedy et al. 2016); evaluations leave it out."""


class Checkpoint(Section):
    """Saving and going on."""
    every: Natural = 0
    """Steps between checkpoints; 0: none on the way."""
    async_: bool = Field(True, alias="async")
    """Write those on the way in a process beside each rank, while the training goes on after a copy in memory (which takes as
    much of the host's memory as the rank's state)."""
    keep: Positive = 3
    """Newest checkpoints that stay."""
    keep_every: Natural = 0
    """Those of steps that this divides stay too; 0: no such rule."""
    keep_best: Natural = 0
    """So many of the lowest validation loss stay too, of those at whose step it was measured (train.eval_every)."""
    max_failures: Positive = 3
    """So many saves in a row that fail end the run; until then it trains on, and tries again at the next `every`. A last save
    is tried twice, and then ends it with exit code 2."""
    remote: Text | None = None
    """Also copy checkpoints there, to any path that fsspec knows (s3://bucket/run with megalm[s3] installed, gs://... with
    gcsfs); a run whose train.dir has none goes on from there. It is tried before the training."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest whole checkpoint of train.dir; never refuses a folder that has one."""
    allow_changes: bool = False
    """Resume although model, data, tokenizer, global batch, optimizer or seed differ; begin with weights of another model."""
    init_from: Text | None = None
    """Start at step 0 from the weights of this checkpoint, or of hf:PATH (Hugging Face), megatron:PATH or neox:PATH."""


class Wandb(Section):
    """Weights & Biases."""
    project: Text
    """The project the run appears in."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """offline needs no account."""
    name: Text | None = None
    """The run's name; default: one that wandb makes up."""


class Logging(Section):
    """Where the numbers go, besides train.dir/metrics.jsonl."""
    every: Natural = 10
    """Steps between logged steps; 0: never."""
    wandb: Wandb | None = None
    """Weights & Biases; default: off."""
    tensorboard: bool = False
    """Event files in train.dir/tensorboard."""


class Config(Section):
    """One run, as its JSON file states it."""
    model: Model
    parallel: Parallel = Parallel()
    batch: Batch
    precision: Precision = Precision()
    recompute: Recompute = Recompute()
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    tokenizer: Tokenizer
    data: Data
    kernels: Kernels = Kernels()
    train: Train
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Extra keys for DeepSpeed's own JSON; what megalm derives may not stand here."""

    def passed_on(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key of the deepspeed section, such as "bf16.immediate_grad_update"."""
        value: Any = self.deepspeed
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value
