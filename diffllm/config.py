"""Settings of the model."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from data.settings import check_fields, setting

_shape = partial(setting, from_scratch=True)


@dataclass
class ModelConfig:
    """A checkpoint, or the shape of a model from scratch if `path` is null.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the rule.
    """

    path: str | None = setting(None, path=True)  # a local directory, hub id or GGUF file; null: a model from scratch
    # of an autoregressive checkpoint: an unused or new token; null is <|mask|>
    mask_token: str | None = None
    # chatml | llama3 | llada | gemma | the path of a .jinja file; null takes the tokenizer's
    chat_template: str | None = setting(None, path=True)
    chat_template_kwargs: dict[str, Any] = setting({})  # variables of the template, such as {enable_thinking: false}
    # sampling: block, as diffusion=block trains | full | auto: block if config.json has a block_length, else full.
    # A run attends as its objective does
    attention: str = setting("auto", choices=("auto", "block", "full"), free_when_resuming=True)
    # from scratch: dream or fast_dllm_v2 (Qwen2, shifted logits) | llada (Llama, not) | sdar (Qwen3, not)
    family: str = _shape("dream", choices=("dream", "llada", "sdar", "fast_dllm_v2"))
    hidden_size: int = _shape(128, at_least=1)  # width of the layers' inputs and outputs
    intermediate_size: int = _shape(384, at_least=1)  # width inside an MLP
    num_hidden_layers: int = _shape(4, at_least=1)  # decoder layers
    num_attention_heads: int = _shape(4, at_least=1)  # of queries; must divide hidden_size
    num_key_value_heads: int = _shape(4, at_least=1)  # of keys and values; must divide num_attention_heads
    max_position_embeddings: int = _shape(2048, at_least=1)  # longest row, in tokens
    rope_theta: float = _shape(10000.0)  # base of the rotary embedding's wavelengths
    tie_word_embeddings: bool = _shape(False)  # embedding and head share one matrix
    initializer_range: float = _shape(0.02, above=0)  # standard deviation of initial weights
    vocab_size: int | None = _shape(None)  # null takes the tokenizer's
    # recompute activations in the backward pass instead of keeping them
    enable_gradient_checkpointing: bool = setting(False, free_when_resuming=True)
    # full: whole layers | selective: all but matrix products and attention
    recompute: str = setting(
        "full",
        choices=("full", "selective"),
        free_when_resuming=True,
        used_with={"enable_gradient_checkpointing": ()},
    )
    # sdpa | varlen: rows without their padding, blocks without a mask of the canvas | flash_attention_2 (extra
    # `flash`): rows without their padding | auto: varlen on GPUs that have it, and to train by blocks; else sdpa
    attn_implementation: str = setting(
        "auto", choices=("auto", "sdpa", "varlen", "flash_attention_2"), free_when_resuming=True
    )
    # chunked, on any device | liger, Triton (extra `liger`)
    loss_kernel: str = setting("chunked", choices=("chunked", "liger"), free_when_resuming=True)
    # true | false | auto: torch.compile each layer and the loss, on a GPU and for a run that is long enough
    compile: str = setting("auto", choices=("auto", "true", "false"), free_when_resuming=True)
    # nf4: keep the linear layers in 4 bits, to sample or to train adapters beside them (extra `quantize`) | none
    quantize: str = setting("none", choices=("none", "nf4"))
    # directory of a LoRA adapter in PEFT's files: with lora_rank it is trained further, else merged into the weights
    adapter: str | None = setting(None, path=True)
    # train adapters of this rank instead of the weights; 0 trains the weights
    lora_rank: int = setting(0, at_least=0, at_most=4096)
    # adapters are scaled by alpha / rank
    lora_alpha: float = setting(16.0, above=0, used_with={"lora_rank": ()})
    target_modules: list[str] = setting(["all-linear"])  # all-linear, or names of layers such as [q_proj,v_proj]

    def __post_init__(self) -> None:
        self.compile = str(self.compile).lower()  # a bool in YAML and on the command line
        check_fields(self, "model")
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_attention_heads={self.num_attention_heads}: must divide "
                f"model.hidden_size={self.hidden_size} and be a multiple of "
                f"model.num_key_value_heads={self.num_key_value_heads}"
            )
