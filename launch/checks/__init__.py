"""The checks of `python -m launch.verify`. To add one, write a function of a `Run` that yields results, and list it."""

from launch.checks.base import Check
from launch.checks.machine import devices, disk_space, memory, packages, settings, shape
from launch.checks.model import checkpoint, first_loss, forward, generation, gradient, memorisation, weights
from launch.checks.rows import batch, canvas, rows, texts, tokenizer, validation

# In this order: training changes the weights that a response is sampled from.
CHECKS = {
    "packages": Check(packages, "missing dependency"),
    "devices": Check(devices, "missing dependency"),
    "settings": Check(settings, "settings are refused"),
    "shape": Check(shape, "the model is refused"),
    "memory": Check(memory, "out of memory", ("settings", "shape")),
    "disk": Check(disk_space, "the disk is full", ("settings", "shape")),
    "checkpoint": Check(checkpoint, "the model is refused", ("shape",)),
    "tokenizer": Check(tokenizer, "tokenizer warnings", ("checkpoint",)),
    "rows": Check(rows, "data is refused", ("settings", "tokenizer")),
    "texts": Check(texts, "tokenizer warnings", ("rows",)),
    "validation": Check(validation, "the loss does not fall", ("rows",)),
    "batch": Check(batch, "the loss does not fall", ("rows",)),
    "canvas": Check(canvas, "poor generations", ("rows",)),
    "weights": Check(weights, "the model is refused", ("tokenizer",)),
    "forward": Check(forward, "the model is refused", ("batch", "weights")),
    "first loss": Check(first_loss, "the loss does not fall", ("forward",)),
    "gradient": Check(gradient, "the loss does not fall", ("memory", "forward")),
    "generation": Check(generation, "poor generations", ("forward",)),
    "memorising": Check(memorisation, "the loss does not fall", ("gradient",)),
}
