"""A batch through the model, on this rank's device."""

from data.loader import Batch
from diffllm import DiffLLM
from diffllm.loss import Focal
from diffllm.modeling_diffllm import Restored
from trainer.world import World


def forward(model: DiffLLM, batch: Batch, world: World, focal: Focal | None = None) -> Restored:
    """Restore a batch's masked tokens on this rank's device."""
    padded = not bool(batch["attention_mask"].all())
    names = ("x_t", "input_ids", "masked", "weights") + (("attention_mask", "position_ids") if padded else ())
    tensors = {name: batch[name].to(world.device, non_blocking=True) for name in (*names, "visible") if name in batch}
    return model(x_0=tensors.pop("input_ids"), focal=focal, **tensors)
