"""A batch through the model, on this rank's device."""

from data.batches import Batch
from diffllm import DiffLLM
from diffllm.loss import Focal
from diffllm.modeling_diffllm import LossOutput
from trainer.distributed import Distributed


def forward(model: DiffLLM, batch: Batch, distributed: Distributed, focal: Focal | None = None) -> LossOutput:
    """Restore a batch's masked tokens on this rank's device."""
    padded = not bool(batch["attention_mask"].all())
    names = ("x_t", "input_ids", "masked", "weights") + (("attention_mask", "position_ids") if padded else ())
    tensors = {
        name: batch[name].to(distributed.device, non_blocking=True) for name in (*names, "visible") if name in batch
    }
    return model(x_0=tensors.pop("input_ids"), focal=focal, **tensors)
