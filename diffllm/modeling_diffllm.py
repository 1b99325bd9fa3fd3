"""A diffusion language model: a Transformers decoder with its causality switched off."""

import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffllm.attention import has_segments, mask_of, without_padding
from diffllm.block_attention import attention_plan
from diffllm.checkpoint_source import CheckpointSource
from diffllm.diffusion.loss import CROSS_ENTROPY, LossOutput, TokenLoss, masked_loss
from diffllm.dream_api import DiffusionGeneration
from diffllm.export import write_checkpoint
from diffllm.families import has_window, switch_off_causality
from sampling import CanvasCache, SamplingConfig, Tokens, Visibility, ids_without_token, to_device, with_cache


class DiffLLM(DiffusionGeneration, nn.Module):
    """Restores masked tokens (`forward`) and generates by unmasking (`diffusion_generate`).

    Attributes:
        lm: the Transformers decoder with its head; attention is bidirectional.
        source: the checkpoint of the model; a model from scratch has one without a name.
        family: the published format.
        published: config.json in that format; `save_pretrained` writes it.
        generation: generation_config.json, empty without one.
        mask_token_id, pad_token_id, eos_token_id: from config.json.
        unnamed_ids: ids of the vocabulary without a token, if the tokenizer is known; they are never sampled.
        block_length: a position attends to its own block of so many positions and earlier ones; None: to all.
        windowed: some layers attend within a window.
        unpad: forward the attended tokens of all rows as one long row.
        flash: the attention is FlashAttention, which takes no mask.
        masked_loss: `diffllm.diffusion.loss.masked_loss`, or another with the same arguments.
        static: calls `decode` through CUDA graphs, see `diffllm.static_forward`; None does not.
        rating: in place of `sampling.confidence.rate`, likewise.
    """

    def __init__(self, lm: PreTrainedModel, source: CheckpointSource):
        super().__init__()
        switch_off_causality(lm)
        # Padding is the end-of-sequence token, which is attended and trained on: its embedding has a gradient.
        lm.get_input_embeddings().padding_idx = None
        self.lm, self.source = lm, source
        self.family, self.published, self.generation = source.family, source.published, source.generation
        self.mask_token_id: int = self.published["mask_token_id"]
        self.eos_token_id: int = self.published["eos_token_id"]
        pad = self.published.get("pad_token_id")
        self.pad_token_id: int = self.eos_token_id if pad is None else pad
        self.unnamed_ids: tuple[int, ...] = ()
        self.block_length: int | None = self.published.get(self.family.block_key)
        if self.block_length is not None and self.block_length >= lm.config.max_position_embeddings:
            self.block_length = None  # a row is one block
        self.windowed = has_window(lm.config)
        self.flash = "flash" in lm.config._attn_implementation
        self.unpad = self.flash or (lm.config._attn_implementation == "varlen" and has_segments(lm.config))
        self.masked_loss = masked_loss
        self.static: Any = None
        self.rating: Any = None
        self._lent: list[tuple[weakref.ref, CanvasCache]] = []

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def vocab_size(self) -> int:
        return self.lm.config.vocab_size

    @property
    def ends(self) -> list[int]:
        """End-of-sequence tokens of config.json and generation_config.json."""
        others = self.generation.get("eos_token_id") or []
        return list(dict.fromkeys([self.eos_token_id, *(others if isinstance(others, list) else [others])]))

    @property
    def special_tokens(self) -> Tokens:
        """Special tokens of `diffusion_generate`: the end is config.json's alone, as in the published code."""
        return Tokens(mask=self.mask_token_id, eos=(self.eos_token_id,), forbidden=self.unnamed_ids)

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set `unnamed_ids` from the model's tokenizer."""
        self.unnamed_ids = ids_without_token(tokenizer, self.vocab_size)

    def forward(
        self,
        x_t: Tensor,
        x_0: Tensor,
        masked: Tensor,
        weights: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        focal: TokenLoss | None = None,
        visible: Tensor | None = None,
        *,
        token_loss: TokenLoss = CROSS_ENTROPY,
        visibility: Visibility | None = None,
        where: tuple[Tensor, Tensor] | None = None,
    ) -> LossOutput:
        """Loss and likelihood of the clean tokens under the masks. The head projects the masked positions only.

        Args:
            x_t: [B, L] noised tokens.
            x_0: [B, L] clean tokens.
            masked: [B, L] bool, the N positions to restore; on any device.
            weights: [B, L] float32, weights of the masked tokens in the loss.
            attention_mask: [B, L], 0 at left padding; None without padding.
            position_ids: [B, L]; None counts from the first column.
            focal: former name of `token_loss`.
            visible: [B, L, L] bool, whether the first position sees the second.
            token_loss: function of a token's nll.
            visibility: in place of `attention_mask` and `visible`.
            where: rows and columns [N] of `masked`; without them the host waits for the GPU.

        Raises:
            ValueError: an argument together with its former name, or see `hidden`.
        """
        if visibility is not None and (attention_mask is not None or visible is not None):
            raise ValueError("visibility is given, leave out attention_mask and visible")
        if focal is not None and token_loss is not CROSS_ENTROPY:
            raise ValueError("token_loss is given, leave out focal")
        visibility = visibility or Visibility(attended=attention_mask, pairs=visible)
        where = masked.nonzero(as_tuple=True) if where is None else where
        hidden = self.hidden(x_t, _positions(x_t, position_ids), visibility, *where)
        targets, weights = x_0[where], weights[where]
        return LossOutput(*self.masked_loss(hidden, self.lm.lm_head.weight, targets, weights, focal or token_loss))

    def logits(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Logits [B, L, V] of the head, as the published code returns them: never shifted."""
        return self.lm(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids).logits

    def denoise(self, x_t: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """Logits [B, L, V] of the clean tokens of x_t [B, L]; shifted families predict from the left neighbour."""
        every = torch.ones_like(x_t, dtype=torch.bool).nonzero(as_tuple=True)
        hidden = self.hidden(x_t, _positions(x_t, position_ids), Visibility(attended=attention_mask), *every)
        return self.head(hidden).unflatten(0, x_t.shape)

    def head(self, hidden: Tensor) -> Tensor:
        """[N, V] logits of `hidden` states [N, D]."""
        return self.lm.lm_head(hidden)

    def hidden(
        self,
        x_t: Tensor,
        position_ids: Tensor,
        visibility: Visibility,
        row: Tensor,
        column: Tensor,
        cache: CanvasCache | None = None,
        static: Any = None,
    ) -> Tensor:
        """[N, D] states that predict the tokens at the N positions `row`, `column` of x_t [B, L].

        Args:
            position_ids: [B, L].
            visibility: the positions that each position sees; on any device.
            row, column: on any device.
            cache: holds keys and values; compute those of its columns only. The columns must contain the N positions,
                and their left neighbours if the family shifts.
            static: in place of `decode`, see `static`.

        Raises:
            ValueError: the model's attention does not support this visibility or this cache.
        """
        if self.block_length is not None and not visibility.needs_pairs:
            visibility = replace(visibility, block=position_ids // self.block_length)
        if visibility.needs_pairs and self.flash:
            raise ValueError("visibility: blocks and pairs need model.attn_implementation=sdpa or varlen")
        if self.windowed and (visibility.needs_pairs or visibility.document is not None):
            raise ValueError("visibility: documents, blocks and pairs need layers without a window")
        if cache is not None:
            self._check_kept()
        seen = visibility.to(x_t.device)
        row, column = (to_device(index, x_t.device) for index in (row, column))
        if self.family.shift:
            column = seen.left_neighbour(row, column)
        segments = visibility.causal or (
            (visibility.attended is not None or visibility.document is not None) and not visibility.needs_pairs
        )
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            static = None
        captured = static is not None and static.takes(x_t.numel())
        if self.unpad and segments and cache is None and not captured:
            inputs, place = without_padding(visibility, x_t, position_ids)
            return self.lm.get_decoder()(**inputs).last_hidden_state[0, place[row, column]]
        if seen.copy is not None and self.lm.config._attn_implementation == "varlen":
            inputs = {"input_ids": x_t, "position_ids": position_ids, "plan": attention_plan(seen)}
            return self.lm.get_decoder()(**inputs).last_hidden_state[row, column]
        columns = None if cache is None else cache.columns
        if columns is not None:
            x_t, position_ids = x_t.gather(1, columns), position_ids.gather(1, columns)
            column = cache.place[row, column]
        mask = mask_of(seen, self.lm.get_input_embeddings().weight.dtype, columns, self.windowed)
        return (static or self.decode)(x_t, position_ids, mask, cache)[row, column]

    def hidden_of_step(self, *arguments: Any) -> Tensor:
        """`hidden` in a sampler, whose forwards have few shapes."""
        return self.hidden(*arguments) if self.static is None else self.hidden(*arguments, static=self.static)

    def decode(
        self, input_ids: Tensor, position_ids: Tensor, mask: Tensor | None, cache: CanvasCache | None = None
    ) -> Tensor:
        """[B, Q, D] hidden states of tokens [B, Q].

        Args:
            mask: of `diffllm.attention.mask_of`.
        """
        kept = {} if cache is None else {"past_key_values": cache, "use_cache": True}
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
        return self.lm.get_decoder()(**inputs, **kept).last_hidden_state

    @property
    def width_multiple(self) -> int:
        """A batch's width is a multiple of it: with graphs few shapes should occur. Rows that grow have many."""
        return 1 if self.static is None else 32 if self.block_length is None else 256

    def lend_cache(self, borrower: object) -> CanvasCache:
        """A cache for keys and values while `borrower` lives. With graphs, which read its memory, it is used again."""
        if self.static is None or torch.is_inference_mode_enabled():  # tensors made there cannot be changed later
            return CanvasCache()
        for i, (owner, cache) in enumerate(self._lent):
            if owner() is None:
                self._lent[i] = weakref.ref(borrower), cache
                cache.clear()
                return cache
        self._lent.append((weakref.ref(borrower), CanvasCache(round_to=8)))
        return self._lent[-1][1]

    def check_sampling(self, config: SamplingConfig) -> None:
        """Refuse a cache or blocks that the attention does not support, and more steps than the context has tokens.

        Raises:
            ValueError: the message names the setting to change.
        """
        context = self.lm.config.max_position_embeddings
        if (config.steps or 0) > context:  # those that commit nothing take time and memory too
            raise ValueError(f"sampling.steps={config.steps}: at most one for each of the context's {context} tokens")
        if with_cache(config, self.block_length).cache != "none":
            self._check_kept()

    def _check_kept(self) -> None:
        if self.flash:
            raise ValueError("sampling.cache keeps padded rows: set model.attn_implementation=sdpa or varlen")
        if self.windowed:
            raise ValueError("sampling.cache cannot follow the window of this model's layers: set sampling.cache=none")

    def save_pretrained(
        self,
        directory: str | Path,
        state_dict: Mapping[str, Tensor] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_shard_size: str = "5GB",
        sampling: SamplingConfig | None = None,
        causal: bool = False,
    ) -> None:
        """Write the published format: safetensors, config.json, generation_config.json, and the tokenizer if given.

        config.json has the block length of a model that attends by blocks.

        Args:
            state_dict: full tensors by their names in this module; by default the module's own.
            max_shard_size: of one file; several files have an index.
            sampling: settings to recommend in generation_config.json; None keeps those of the source.
            causal: the model was trained causally: write the format of Transformers' causal models.
        """
        tokens = {
            "bos_token_id": self.published.get("bos_token_id"),
            "eos_token_id": self.ends if len(self.ends) > 1 else self.eos_token_id,
            "pad_token_id": self.pad_token_id,
        }
        weights = self.state_dict() if state_dict is None else state_dict
        key = self.family.block_key
        published = {name: value for name, value in self.published.items() if name != key}
        if self.block_length is not None or key in self.family.defaults:  # a row is one block
            published[key] = self.block_length or self.lm.config.max_position_embeddings
        source = replace(self.source, published=published)
        write_checkpoint(
            directory, weights, source, self.lm.config, tokens, tokenizer, max_shard_size, sampling, causal
        )


def _positions(x_t: Tensor, position_ids: Tensor | None) -> Tensor:
    """[B, L] the given position ids, or column numbers."""
    return torch.arange(x_t.shape[1], device=x_t.device).expand_as(x_t) if position_ids is None else position_ids
