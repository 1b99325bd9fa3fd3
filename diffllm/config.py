"""Settings of the model."""

from dataclasses import dataclass, field
from typing import Any

FAMILY_NAMES = ("dream", "llada")
LOSS_KERNELS = ("chunked", "liger")
RECOMPUTED = ("full", "selective")
ATTENTIONS = ("sdpa", "flash_attention_2")
SIZE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
# Of ModelConfig, for a model from scratch; a checkpoint has its own.
SHAPE_FIELDS = (*SIZE_FIELDS, "family", "rope_theta", "tie_word_embeddings", "initializer_range", "vocab_size")


@dataclass
class ModelConfig:
    """A checkpoint, or the shape of a model made from scratch when `path` is null.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    path: str | None = None  # a local directory, hub id or GGUF file; null makes a model from scratch
    # of an autoregressive checkpoint: a token that nothing uses, or one that is added; null is <|mask|>
    mask_token: str | None = None
    # chatml | llama3 | llada | gemma | the path of a .jinja file; null takes the tokenizer's
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # its variables, as {enable_thinking: false}
    family: str = "dream"  # from scratch: dream (Qwen2, shifted logits) | llada (Llama, not shifted)
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False  # one matrix reads and writes tokens
    initializer_range: float = 0.02  # standard deviation of fresh weights
    vocab_size: int | None = None  # null takes the tokenizer's
    enable_gradient_checkpointing: bool = False  # recompute activations in the backward pass instead of keeping them
    recompute: str = "full"  # then: full, whole layers | selective, all but matrix products and attention
    attn_implementation: str = "sdpa"  # sdpa | flash_attention_2 (extra `flash`), which forwards unpadded rows
    loss_kernel: str = "chunked"  # chunked, on any device | liger, Triton (extra `liger`)
    compile: bool = False  # torch.compile each layer
    lora_rank: int = 0  # train adapters of this rank instead of the weights; 0 trains the weights
    lora_alpha: float = 16.0  # adapters count alpha / rank times
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])  # adapted: or names as [q_proj,v_proj]

    def __post_init__(self) -> None:
        if self.family not in FAMILY_NAMES:
            raise ValueError(f"model.family={self.family}: choose one of {', '.join(FAMILY_NAMES)}")
        for name in SIZE_FIELDS:
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: must be at least 1")
        for name, allowed in (
            ("loss_kernel", LOSS_KERNELS),
            ("recompute", RECOMPUTED),
            ("attn_implementation", ATTENTIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"model.{name}={getattr(self, name)}: choose one of {', '.join(allowed)}")
        if self.lora_rank < 0:
            raise ValueError(f"model.lora_rank={self.lora_rank}: must not be negative")
        if self.lora_alpha <= 0:
            raise ValueError(f"model.lora_alpha={self.lora_alpha}: must be positive")
        if self.initializer_range <= 0:
            raise ValueError(f"model.initializer_range={self.initializer_range}: must be positive")
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_attention_heads={self.num_attention_heads}: must divide "
                f"model.hidden_size={self.hidden_size} and be a multiple of "
                f"model.num_key_value_heads={self.num_key_value_heads}"
            )
