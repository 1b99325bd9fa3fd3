"""FSDP2 training: optimizer, checkpoints, metrics and the loop."""
