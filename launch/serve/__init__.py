"""An OpenAI-compatible server: `python -m launch.serve model.path=outputs/quickstart/hf`."""
