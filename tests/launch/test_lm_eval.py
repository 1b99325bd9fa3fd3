"""The model `diffllm` of lm-eval, on tasks in local files."""

import json
import logging
import runpy
import sys
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch

from data import prompt_ids
from diffllm.generate import generate, special_tokens
from diffllm.tokenizer import builtin_tokenizer
from launch.lm_eval_arguments import compose_settings, split_arguments
from sampling import SamplingConfig, sample, score
from tests.conftest import ROOT
from tests.trainer.processes import TORCHRUN, Run

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'diffllm[lm-eval]'")

import lm_eval.tasks
import lm_eval.utils
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from launch import lm_eval as harness

QUESTIONS = ["Solve 3x+5=20", "Solve 2x+4=8", "Solve x=1"]
SMALL = {"max_new_tokens": 8, "diffusion_steps": 4, "temperature": 0.0, "mc_num": 4, "batch_size": 2}
CONFIG = SamplingConfig(max_new_tokens=8, steps=4, temperature=0.0, top_p=0.95)  # with what is recommended to a Dream
TASKS = {
    "answer": {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Q:"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": ["5", "twenty"],
        "doc_to_target": 1,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "{{question}}",
        "doc_to_text": "",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}
NAMES = [f"local_{name}" for name in TASKS]


@pytest.fixture(autouse=True)
def _warnings_of_this_test(caplog, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)  # handlers of other tests write to streams that are closed
    lm_eval.utils.warning_once.cache_clear()
    caplog.set_level("WARNING", logger=harness.logger.name)  # Hydra leaves the root logger at ERROR


@pytest.fixture
def checkpoint(small_model, tokenizer, tmp_path) -> Path:
    small_model.save_pretrained(tmp_path / "model", tokenizer=tokenizer)
    return tmp_path / "model"


@pytest.fixture
def model(checkpoint):
    """Makes the model of lm-eval from arguments."""
    return lambda **changes: harness.HarnessModel(pretrained=str(checkpoint), **SMALL | changes)


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A directory of tasks, in YAML, which is a superset of JSON."""
    (tmp_path / "tasks").mkdir()
    rows = [{"question": question, "answer": "5"} for question in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "doc_to_text": "{{question}}"}
    for name, task in TASKS.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps({"task": f"local_{name}", **common, **task}))
    return tmp_path / "tasks"


@pytest.fixture
def command(tasks, checkpoint, monkeypatch, capsys):
    """Runs the command line; returns exit code, stderr, and the directory of the results."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
    # lm-eval reads the thousands of files of its own tasks first.
    own = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # its handler would keep this test's stderr
    output = checkpoint.parent / "output"

    def run(arguments: str, *options: str, names: str = "local_answer") -> tuple[int, str, Path]:
        given = ["--model_args", arguments, "--tasks", names, "--include_path", str(tasks), *options]
        monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "diffllm", *given, "--output_path", str(output)])
        capsys.readouterr()
        try:
            harness.main()
            code = 0
        except SystemExit as exit:
            code = exit.code
        return code, capsys.readouterr().err, output / str(checkpoint).replace("/", "__")

    return run


def samples(directory: Path, task: str) -> list[dict]:
    [file] = directory.glob(f"samples_local_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def ask(context: str, doc_id: int = 0, repeats: int = 1, **gen_kwargs) -> Instance:
    return Instance("generate_until", {}, (context, gen_kwargs), 0, ("a task", doc_id, repeats))


def weigh(*texts: str) -> Instance:
    return Instance("loglikelihood", {}, texts, 0, ("a task", 0, 1))


def ids(text: str) -> list[int]:
    return builtin_tokenizer()(text, add_special_tokens=False)["input_ids"]


def answers(small_model, tokenizer, prompts, **changes) -> list[str]:
    found = generate(small_model, tokenizer, prompts, SamplingConfig(**vars(CONFIG) | changes))
    return [response.text for response in sorted(found, key=lambda response: response.row_id)]


def test_results_of_the_command_line(command, checkpoint, small_model, tokenizer):
    arguments = f"pretrained={checkpoint},diffusion_steps=4,alg=entropy,mc_num=4"
    code, err, directory = command(arguments, "--log_samples", "--batch_size", "2", names=",".join(NAMES))
    assert code == 0, err
    assert "sampling.top_p=0.95" in err  # recommended for Dream
    [results] = map(json.loads, (file.read_text() for file in directory.glob("results_*.json")))
    assert results["results"].keys() == {*NAMES}
    assert results["config"]["sampling"]["steps"] == 4
    assert results["config"]["sampling"]["batch_size"] == 2
    assert results["config"]["harness"]["mc_num"] == 4

    responses = [found["resps"] for found in samples(directory, "answer")]
    assert responses == [[[text]] for text in answers(small_model, tokenizer, [*map(ids, QUESTIONS)], max_new_tokens=6)]

    special = special_tokens(small_model, tokenizer, CONFIG)
    for question, found in zip(QUESTIONS, samples(directory, "choice"), strict=True):
        for [[bound, _]], choice in zip(found["resps"], (" 5", " twenty"), strict=True):
            exact = score(small_model, ids(question), ids(choice), special, samples=4)
            assert float(bound) == pytest.approx(exact.mean, rel=1e-5)
    for question, found in zip(QUESTIONS, samples(directory, "rolling"), strict=True):
        whole = score(small_model, [tokenizer.bos_token_id], ids(question), special, samples=4)
        assert float(found["resps"][0][0]) == pytest.approx(whole.mean, rel=1e-5)


def test_the_chat_template_of_the_command_line(command, checkpoint, small_model, tokenizer, caplog):
    options = "--log_samples", "--apply_chat_template", "--system_instruction", "Be brief."
    code, err, directory = command(f"pretrained={checkpoint},max_new_tokens=8,diffusion_steps=4", *options)
    assert code == 0, err
    assert "max_new_tokens=8 of --model_args replaces the task's max_new_tokens=6" in caplog.text
    chats = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}] for question in QUESTIONS
    ]
    prompts = [prompt_ids(chat, tokenizer) for chat in chats]
    found = samples(directory, "answer")
    assert [each["arguments"]["gen_args_0"]["arg_0"] for each in found] == [*map(tokenizer.decode, prompts)]
    assert [each["resps"] for each in found] == [[[text]] for text in answers(small_model, tokenizer, prompts)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("diffusion_step=4", ["diffusion_step=4", "did you mean diffusion_steps?"]),
        ("quantize=nf4", ["quantize=nf4", "did you mean model.quantize?"]),
        ("temperature=-1", ["sampling.temperature=-1.0"]),
        ("temperature=warm", ["sampling.temperature", "'warm'"]),
        ("alg=entropi", ["sampling.alg=entropi", "maskgit_plus"]),
        ("steps=4,diffusion_steps=5", ["steps, diffusion_steps"]),
        ("batch_size=auto", ["sampling.batch_size", "'auto'"]),
        ("nll_type=ar_ftb", ["nll_type=ar_ftb", "mc"]),
        ("mc_num=3", ["mc_num=3", "even"]),
        ("mc_num=few", ["mc_num", "'few'"]),
        ("classifier_free_guidance=none", ["classifier_free_guidance=none"]),
        ("dtype=bfloat16", ["dtype=bfloat16", "float32"]),
        ("device=gpu", ["device=gpu", "cuda"]),
        ("max_length=4096", ["max_length=4096", "2048"]),
        ("max_length=8,max_new_tokens=8", ["max_new_tokens=8", "8 tokens"]),
        ("forbidden=57", ["sampling.forbidden", "list"]),
        ("pretrained=nowhere", ["model.path=nowhere"]),
        ("pretrained=None", ["pretrained is missing"]),
    ],
)
def test_mistakes_end_in_one_error(command, checkpoint, arguments, words):
    code, err, directory = command(arguments if "pretrained" in arguments else f"pretrained={checkpoint},{arguments}")
    assert code == 1
    assert "Traceback" not in err
    [error] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert [word for word in words if word not in error] == []
    assert not directory.exists()


def test_an_unknown_task_is_one_error(command, checkpoint):
    code, err, _ = command(f"pretrained={checkpoint}", names="local_nothing")
    assert (code, err.splitlines()[-1]) == (1, "error: Tasks not found: local_nothing")


def test_without_lm_eval(monkeypatch):
    monkeypatch.delitem(sys.modules, "launch.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit, match=r"^error: .*diffllm\[lm-eval\]"):
        runpy.run_module("launch.lm_eval", run_name="__main__")


def test_ranks_without_their_group_are_refused(model, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"torchrun --nproc_per_node=2 -m launch\.lm_eval"):
        model()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"diffusion_steps": "256", "temperature": "0.1"}, {"steps": 256, "temperature": 0.1}),
        ({"gen_length": 512, "block_size": 32}, {"max_new_tokens": 512, "block_length": 32}),
        ({"remasking": "low_confidence", "cfg": 0.5}, {"alg": "maskgit_plus", "cfg_scale": 0.5}),
        ({"classifier_free_guidance": 1.5}, {"cfg_scale": 0.5}),
        ({"classifier_free_guidance": 1}, {"cfg_scale": 0.0}),
        ({"stop": "\\n", "forbidden": ["5"]}, {"stop": ["\n"], "forbidden": ["5"]}),
        ({"cache": "dual", "transfer": "threshold", "threshold": 0.5}, {"cache": "dual", "threshold": 0.5}),
        ({"seed": 3, "top_p": None}, {"seed": 3, "top_p": None, "temperature": 0.2}),
    ],
)
def test_arguments_become_settings(checkpoint, arguments, expected):
    own, settings = split_arguments({"pretrained": str(checkpoint), **arguments})
    config, _ = compose_settings(settings)
    assert own == {}
    assert {name: getattr(config.sampling, name) for name in expected} == expected


def test_arguments_win_over_the_options_of_lm_eval(checkpoint):
    options = {"batch_size": "3", "device": "cuda:0", "max_batch_size": None}
    of_string = harness.HarnessModel.create_from_arg_obj({"pretrained": str(checkpoint)}, options)
    assert (of_string.sampling.batch_size, of_string.device) == (3, torch.device("cpu"))
    arguments = {"pretrained": str(checkpoint), "batch_size": 5, "model.chat_template": "llada"}
    with pytest.raises(ValueError, match=r"model\.chat_template=llada"):  # the tokenizer has no such tokens
        harness.HarnessModel.create_from_arg_obj(arguments, options)
    del arguments["model.chat_template"]
    assert harness.HarnessModel.create_from_arg_obj(arguments, options).sampling.batch_size == 5


def test_the_model_is_registered():
    assert get_model("diffllm") is harness.HarnessModel


def test_each_request_has_its_stop_strings(model, small_model, tokenizer):
    first, second, _ = texts = answers(small_model, tokenizer, [*map(ids, QUESTIONS)], max_new_tokens=12)
    ends = first[3:5], second[5:8]
    assert (first.index(ends[0]), second.index(ends[1])) == (3, 5)
    requests = [
        ask(QUESTIONS[2], 2, until=[], max_gen_toks=12),
        ask(QUESTIONS[1], 1, until=[ends[1], ""], max_gen_toks=12),
        ask(QUESTIONS[0], 0, until=ends[0], max_gen_toks=12),
    ]
    assert model(max_new_tokens=12).generate_until(requests) == [texts[2], second[:5], first[:3]]
    assert model(max_new_tokens=12, escape_until=True).generate_until(requests) == texts[::-1]


def test_settings_of_arguments_requests_and_checkpoint(checkpoint, caplog):
    plain = harness.HarnessModel(pretrained=str(checkpoint), mc_num=4)
    assert plain._config_of({"until": []}).temperature == 0.2  # recommended for Dream
    assert plain._config_of({"until": [], "do_sample": False}).temperature == 0.0
    config = plain._config_of({"temperature": 0.7, "max_gen_toks": 9, "until": ["a"], "num_beams": 1})
    assert (config.temperature, config.max_new_tokens, config.stop) == (0.7, 9, ["a"])
    assert "without effect: num_beams" in caplog.text
    for name, value in {"steps": "x", "temperature": -1.0, "alg": "entropi"}.items():
        with pytest.raises(ValueError, match=name):
            plain._config_of({"until": [], name: value})
    given = harness.HarnessModel(pretrained=str(checkpoint), temperature=0.1, stop=["b"])
    config = given._config_of({"do_sample": False, "until": ["a"]})
    assert (config.temperature, config.stop) == (0.1, ["b", "a"])
    assert "temperature=0.1 of --model_args replaces the task's temperature=0.0" in caplog.text


def test_repetitions_differ_and_do_not_depend_on_other_requests(model):
    warm = model(temperature=1.0)
    repeated = [ask(QUESTIONS[0], 0, 2), ask(QUESTIONS[1], 1, 2)]
    a, b, c, d = warm.generate_until([repeated[0], repeated[0], repeated[1], repeated[1]])
    assert len({a, b, c, d}) == 4
    assert warm.generate_until([repeated[1], repeated[1]]) == [c, d]
    # With several ranks lm-eval fills up the requests of a rank with its last one.
    assert warm.generate_until([repeated[1]] * 4) == [c, d, c, d]


def test_long_prompts_lose_their_start(model, small_model, tokenizer, caplog):
    short = model(max_length=12)
    requests = [ask("Q" * 20 + "Solve", doc_id) for doc_id in range(2)]
    assert short.generate_until(requests) == answers(small_model, tokenizer, [ids("QQQSolve")] * 2)[:1] * 2
    short.loglikelihood([weigh("Q" * 20, "5" * 3)])
    assert caplog.text.count("max_length") == 1
    [(bound, _)] = short.loglikelihood([weigh("Q" * 20, " twenty")])
    special = special_tokens(small_model, tokenizer, CONFIG)
    expected = score(small_model, ids("Q" * 5), ids(" twenty"), special, samples=4).mean
    assert bound == pytest.approx(expected, rel=1e-5)


def test_a_continuation_that_does_not_fit_is_refused(model):
    with pytest.raises(ValueError, match="10 tokens, more than max_length=8"):
        model(max_length=8).loglikelihood([weigh("Q", "Q" * 10)])


def test_a_bos_token_before_prompts(model, small_model, tokenizer):
    prompt = [tokenizer.bos_token_id, *ids(QUESTIONS[0])]
    with_bos = model(add_bos_token=True)
    assert with_bos.generate_until([ask(QUESTIONS[0])]) == answers(small_model, tokenizer, [prompt])
    special = special_tokens(small_model, tokenizer, CONFIG)
    for text in (QUESTIONS[0], ""):  # an empty context is the bos token alone
        [(bound, _)] = with_bos.loglikelihood([weigh(text, " 5")])
        expected = score(small_model, [tokenizer.bos_token_id, *ids(text)], ids(" 5"), special, samples=4).mean
        assert bound == pytest.approx(expected, rel=1e-5)


def test_what_sampling_writes_is_greedy(model, small_model):
    prompt = ids(QUESTIONS[0])
    config = SamplingConfig(max_new_tokens=3, top_p=0.95, stop_at_eos=False)
    written = sample(small_model, torch.tensor([prompt]), config, small_model.special_tokens).sequences[0].tolist()
    responses = written[-3:], [*written[-3:-1], 0], ids(" 5")
    requests = [(("", ""), prompt, response) for response in responses]
    assert [greedy for _, greedy in model(temperature=1.0)._loglikelihood_tokens(requests)] == [True, False, False]
    assert not any(greedy for _, greedy in model(is_check_greedy=False)._loglikelihood_tokens(requests))


def test_guidance_of_a_likelihood(model, small_model, tokenizer):
    mask, [token] = tokenizer.mask_token_id, ids("5")
    prompt = ids(QUESTIONS[0])
    rows = torch.tensor([[*prompt, mask], [mask] * (len(prompt) + 1)])
    with torch.no_grad():
        logits, without = small_model.denoise(rows)[:, -1]
    expected = (without + 1.5 * (logits - without)).log_softmax(-1)[token].item()
    requests = [weigh(QUESTIONS[0], text) for text in ("5", "six")]
    (bound, _), _ = model(cfg=0.5).loglikelihood(requests)
    assert bound == pytest.approx(expected, rel=1e-4)
    (plain, _), _ = model().loglikelihood(requests)
    assert abs(plain - expected) > 1e-3


def test_long_texts_are_scored_in_windows(model, small_model, tokenizer):
    text = "a long text of letters"
    tokens, special = ids(text), special_tokens(small_model, tokenizer, CONFIG)
    assert len(tokens) == 22
    windows = ([tokenizer.bos_token_id], tokens[:9]), (tokens[8:9], tokens[9:18]), (tokens[12:18], tokens[18:])
    expected = sum(score(small_model, *window, special, samples=4).mean for window in windows)
    requests = [Instance("loglikelihood_rolling", {}, (each,), 0, ("a task", 0, 1)) for each in (text, "")]
    found = model(max_length=10).loglikelihood_rolling(requests)
    assert found == [pytest.approx(expected, rel=1e-5), 0]


def test_results_are_cached_one_by_one(model, monkeypatch):
    kept, lm = [], model()
    monkeypatch.setattr(lm.cache_hook, "add_partial", lambda *given: kept.append(given))
    request = ask(QUESTIONS[0], max_gen_toks=4)
    [text] = lm.generate_until([request])
    [result] = lm.loglikelihood([weigh(QUESTIONS[0], "5")])
    [bound] = lm.loglikelihood_rolling([weigh("5")])
    assert kept == [
        ("generate_until", request.args, text),
        ("loglikelihood", (QUESTIONS[0], "5"), result),
        ("loglikelihood_rolling", ("5",), bound),
    ]


def test_an_answer_that_has_begun_follows_the_prompt(model, tokenizer):
    chat = [{"role": "user", "content": "Solve 1"}, {"role": "assistant", "content": "x="}]
    before = tokenizer.decode(prompt_ids(chat[:1], tokenizer))
    assert model().apply_chat_template(chat[:1]) == before
    assert model().apply_chat_template(chat, add_generation_prompt=False) == before + "x="


@pytest.mark.slow
def test_two_ranks_answer_as_one(checkpoint, tasks):
    def answered(ranks: list[str], output: Path) -> list[dict]:
        arguments = f"pretrained={checkpoint},diffusion_steps=4,mc_num=4,temperature=1"
        options = "--log_samples", "--output_path", output, "--include_path", tasks, "--batch_size", "2"
        command = [*ranks, "-m", "launch.lm_eval", "--model", "diffllm", "--model_args", arguments]
        with Run(tasks.parent, *command, "--tasks", ",".join(NAMES), *options, PYTHONPATH=str(ROOT)) as run:
            assert run.process.wait(300) == 0, run.text
        [results] = output.glob("*/results_*.json")
        scores = {name: list(values.values()) for name, values in json.loads(results.read_text())["results"].items()}
        found = sorted(samples(results.parent, "answer"), key=lambda each: each["doc_id"])
        return [scores, [each["filtered_resps"] for each in found]]

    one = answered([sys.executable], checkpoint.parent / "one")
    two = answered(TORCHRUN, checkpoint.parent / "two")
    assert one[1] == two[1]
    assert one[0]["local_rolling"][1] == pytest.approx(two[0]["local_rolling"][1])


def test_an_argument_that_does_nothing_is_named(checkpoint):
    _, lines = compose_settings({"model.path": str(checkpoint), "sampling.threshold": 0.5, "sampling.factor": 2.0})
    assert [line.split(" does")[0] for line in lines if line.startswith("warning")] == [
        "warning: sampling.threshold=0.5",
        "warning: sampling.factor=2.0",
    ]
