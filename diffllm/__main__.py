"""List the commands: `diffllm` or `python -m diffllm`."""

from data.terminal import running

COMMANDS = {
    "train.py": ("train a model", "torchrun --nproc_per_node=2 train.py experiment=quickstart"),
    "sample.py": ("answer prompts, fill in templates, chat", 'python sample.py model.path=DIR prompt="Solve 3x+5=20"'),
    "launch.playground": ("try out a model on a page", "python -m launch.playground model.path=DIR"),
    "sampling.render": ("show a recorded sampling", "python -m sampling.render run.jsonl run.html"),
    "evaluate.py": ("score answers to tasks", "python evaluate.py model.path=DIR data.val_files=test.jsonl"),
    "data.prepare": ("convert a published set to rows", "python -m data.prepare gsm8k train.jsonl"),
    "diffllm.adapt": ("make a causal model a diffusion model", "python -m diffllm.adapt Qwen/Qwen2.5-7B DIR"),
    "launch.lm_eval": (
        "evaluate by lm-eval",
        "python -m launch.lm_eval --model diffllm --model_args pretrained=M --tasks bbh",
    ),
    "launch.compare": ("compare results of evaluate.py", "python -m launch.compare outputs/A outputs/B"),
    "launch.compare_sampling": (
        "compare ways to sample",
        "python -m launch.compare_sampling model.path=DIR sampling.steps=6,18",
    ),
    "launch.plan": ("predict memory and time", "python -m launch.plan experiment=dream_s1k gpu=h100 gpus=8"),
    "launch.serve": ("serve a model as OpenAI's API does", "python -m launch.serve model.path=DIR"),
    "launch.show": ("show rows as they are trained on", "python -m launch.show experiment=quickstart rows=3"),
    "launch.verify": ("check whether a run would work", "python -m launch.verify experiment=quickstart"),
    "launch.experiments": ("run an experiment", "python -m launch.experiments ar_vs_diffusion quickstart"),
    "launch.experiments.sweep": ("compare jobs over seeds", "python -m launch.experiments.sweep multirun/TIME"),
    "launch.reference": ("write the page of all settings", "python -m launch.reference"),
    "trainer.export": ("write a checkpoint as a model", "python -m trainer.export CHECKPOINT DIR"),
    "trainer.plot": ("draw the metrics of runs", "python -m trainer.plot outputs/A outputs/B"),
    "trainer.replay": ("repeat a step that was not finite", "python -m trainer.replay FILE"),
}


def main() -> None:
    """Print one line for each command, with an example. They run in a checkout of the repository."""
    names, texts = max(map(len, COMMANDS)), max(len(text) for text, _ in COMMANDS.values())
    with running():
        for name, (text, example) in COMMANDS.items():
            print(f"{name:{names}}  {text:{texts}}  {example}")


if __name__ == "__main__":
    main()
