"""Experiments: sweeps that are scored, compared over seeds, drawn, and written into README.md of this directory."""
