"""Settings of the model and of the forward process."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from data.settings import check_fields, setting

T_SAMPLERS = ("importance", "stratified", "uniform")
TIME_REWEIGHTINGS = ("none", "original", "linear", "cart")
LOSS_NORMS = ("masked", "maskable", "sequence")


_shape = partial(setting, from_scratch=True)


@dataclass
class ModelConfig:
    """A checkpoint, or the shape of a model made from scratch when `path` is null.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    path: str | None = setting(None, path=True)  # a local directory, hub id or GGUF file; null: a model from scratch
    # of an autoregressive checkpoint: a token that nothing uses, or one that is added; null is <|mask|>
    mask_token: str | None = None
    # chatml | llama3 | llada | gemma | the path of a .jinja file; null takes the tokenizer's
    chat_template: str | None = setting(None, path=True)
    chat_template_kwargs: dict[str, Any] = setting({})  # its variables, as {enable_thinking: false}
    # from scratch: dream (Qwen2, shifted logits) | llada (Llama, not shifted)
    family: str = _shape("dream", choices=("dream", "llada"))
    hidden_size: int = _shape(128, at_least=1)
    intermediate_size: int = _shape(384, at_least=1)
    num_hidden_layers: int = _shape(4, at_least=1)
    num_attention_heads: int = _shape(4, at_least=1)
    num_key_value_heads: int = _shape(4, at_least=1)
    max_position_embeddings: int = _shape(2048, at_least=1)
    rope_theta: float = _shape(10000.0)
    tie_word_embeddings: bool = _shape(False)  # one matrix reads and writes tokens
    initializer_range: float = _shape(0.02, above=0)  # standard deviation of fresh weights
    vocab_size: int | None = _shape(None)  # null takes the tokenizer's
    # recompute activations in the backward pass instead of keeping them
    enable_gradient_checkpointing: bool = setting(False, free_when_resuming=True)
    # then: full, whole layers | selective, all but matrix products and attention
    recompute: str = setting("full", choices=("full", "selective"), free_when_resuming=True)
    # sdpa | flash_attention_2 (extra `flash`), which forwards unpadded rows
    attn_implementation: str = setting("sdpa", choices=("sdpa", "flash_attention_2"), free_when_resuming=True)
    # chunked, on any device | liger, Triton (extra `liger`)
    loss_kernel: str = setting("chunked", choices=("chunked", "liger"), free_when_resuming=True)
    compile: bool = setting(False, free_when_resuming=True)  # torch.compile each layer
    lora_rank: int = setting(0, at_least=0)  # train adapters of this rank instead of the weights; 0 trains the weights
    lora_alpha: float = setting(16.0, above=0)  # adapters count alpha / rank times
    target_modules: list[str] = setting(["all-linear"])  # adapted layers, or names as [q_proj,v_proj]

    def __post_init__(self) -> None:
        check_fields(self, "model")
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_attention_heads={self.num_attention_heads}: must divide "
                f"model.hidden_size={self.hidden_size} and be a multiple of "
                f"model.num_key_value_heads={self.num_key_value_heads}"
            )


@dataclass
class DiffusionConfig:
    """The forward process and the weights of the loss.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    # importance: stratified, and small t more often where time_reweighting=original makes them heavy, each loss term
    # corrected | stratified over the global batch | uniform, independent draws
    t_sampler: str = "importance"
    eps: float = 1e-3  # t is in [eps, 1)
    time_reweighting: str = "original"  # none: 1 | original: 1/t | linear: 1-t | cart: by the unmasked neighbours
    cart_p: float = 0.1  # parameter of CART's geometric distribution; 1 counts the two direct neighbours only
    token_reweighting: bool = False  # focal: alpha·(1 - exp(-nll))^gamma·nll
    token_reweighting_alpha: float = 0.25
    token_reweighting_gamma: float = 2.0
    # steps in which positions come to see those after them, for a model that was trained causally; 0: from the start
    attention_annealing_steps: int = 0
    loss_norm: str = "maskable"  # what the loss is divided by: masked tokens | maskable tokens | sequences

    def __post_init__(self) -> None:
        for name, allowed in (
            ("t_sampler", T_SAMPLERS),
            ("time_reweighting", TIME_REWEIGHTINGS),
            ("loss_norm", LOSS_NORMS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"diffusion.{name}={getattr(self, name)}: choose one of {', '.join(allowed)}")
        if not 0 < self.eps < 1:
            raise ValueError(f"diffusion.eps={self.eps}: must be in (0, 1)")
        if not 0 < self.cart_p <= 1:
            raise ValueError(f"diffusion.cart_p={self.cart_p}: must be in (0, 1]")
        for name in ("token_reweighting_alpha", "token_reweighting_gamma", "attention_annealing_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"diffusion.{name}={getattr(self, name)}: must not be negative")
