"""Sampling through graphs and compiled layers gives the tokens of plain forwards."""

import copy
from threading import Thread

import pytest
import torch
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

from diffllm import new_model, static_forward
from diffllm.compilation import RECOMPILATIONS
from diffllm.static_forward import StaticForward, compile_sampling, compiled_rating, prepare_sampling
from diffllm.tokenizer import builtin_tokenizer
from sampling import Canvas, SamplingConfig, fill, sample, score
from sampling.confidence import propose
from sampling.sampler import Sampler
from tests.conftest import small_shape

PROMPTS = [([5, 6, 7, 8, 9], 12), ([20, 21], 9), ([40, 41, 42], 12), ([60], 5), ([70, 71], 12)]


def capture(run):
    """A graph of operators on the very tensors that the function read and wrote, as a CUDA graph is one of kernels."""
    for _ in range(2):
        run()
    return make_fx(run)()


@pytest.fixture
def model(tokenizer):
    return new_model(small_shape(initializer_range=0.3), tokenizer).double().eval()


def filled(model, **changes):
    config = SamplingConfig(**{"steps": 12, "stop_at_eos": False, "batch_size": 3} | changes)
    canvases = [Canvas.after(prompt, new, model.mask_token_id, name) for name, (prompt, new) in enumerate(PROMPTS)]
    rows = sorted(fill(model, canvases, config, model.special_tokens), key=lambda row: row.canvas.row_id)
    return [(row.tokens, row.nfe) for row in rows]


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.7, "top_p": 0.9, "alg": "maskgit_plus"},
        {"cfg_scale": 0.5},
        pytest.param({"cache": "prefix", "block_length": 4}, marks=pytest.mark.slow),
        {"cache": "dual", "block_length": 4, "transfer": "threshold", "threshold": 0.05},
        {"cache": "delayed", "cache_refresh": 3},
        pytest.param({"cache": "dual", "block_length": 4, "cfg_scale": 0.5, "remask": 0.5}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_graphs_change_no_token(model, changes, batch_size):
    plain = filled(model, batch_size=batch_size, **changes)
    model.static = StaticForward(model.decode, "true", capture)
    for _ in range(2):  # the second time through graphs, and memory, of the first
        assert filled(model, batch_size=batch_size, **changes) == plain
    assert model.static.graphs
    captured = {key: model.static.seen[key] for key in model.static.graphs}
    assert max(captured.values()) > static_forward.CAPTURED_AT


@pytest.mark.parametrize("multiple", [pytest.param(256, marks=pytest.mark.slow), 4])
def test_graphs_change_no_token_of_rows_that_grow(model, monkeypatch, multiple):
    """With a small multiple the buffers of keys and values grow beneath the graphs."""
    model.block_length = 4
    settings = {"transfer": "threshold", "threshold": 0.05, "cfg_scale": 0.5}
    plain = filled(model, **settings)
    model.static = StaticForward(model.decode, "true", capture)
    assert model.width_multiple == 256
    monkeypatch.setattr(type(model), "width_multiple", multiple)
    monkeypatch.setattr(static_forward, "CAPTURED_AT", 3)
    for _ in range(2):
        assert filled(model, **settings) == plain
    assert model.static.graphs


def test_memory_that_has_moved_is_not_read_again(model):
    """For the longer rows of the second call the buffers of keys and values grow; then shapes of the first recur."""
    settings = {"cache": "dual", "block_length": 4, "batch_size": 1}
    config = SamplingConfig(steps=12, stop_at_eos=False, **settings)
    rows = [([5, 6, 7, 8], 8), ([*range(10, 40)], 12), ([9, 8, 7, 6], 8)]
    canvases = [Canvas.after(prompt, new, model.mask_token_id) for prompt, new in rows]
    plain = [next(fill(model, [canvas], config, model.special_tokens)).tokens for canvas in canvases]
    model.static = StaticForward(model.decode, "true", capture)
    assert [next(fill(model, [canvas], config, model.special_tokens)).tokens for canvas in canvases] == plain


def test_gradients_go_past_the_graphs(model):
    model.static = StaticForward(model.decode, "true", capture)
    filled(model)
    for _ in range(static_forward.CAPTURED_AT + 1):
        model.zero_grad()
        model.denoise(torch.tensor([[5, 6, model.mask_token_id]])).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_inference_mode_leaves_nothing_behind(model):
    settings = {"cache": "dual", "block_length": 4}
    plain = filled(model, **settings)
    model.static = StaticForward(model.decode, "true", capture)
    with torch.inference_mode():
        assert filled(model, **settings) == plain
    assert not model.static.graphs
    assert filled(model, **settings) == plain


def test_a_copy_computes_with_its_own_weights(model, monkeypatch):
    monkeypatch.setattr(static_forward, "backend_of", lambda _: "eager")
    prepare_sampling(model, True)
    before = filled(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm.get_decoder().layers[0].mlp.down_proj.weight.neg_()
    plain = new_model(small_shape(initializer_range=0.3), builtin_tokenizer()).double().eval()
    plain.load_state_dict(other.state_dict())
    assert filled(other) == filled(plain) != before
    assert other.static is None


def test_settings_that_do_not_exist(model):
    with pytest.raises(ValueError, match=r"sampling\.compile=fast: choose one of auto, true, false"):
        prepare_sampling(model, "fast")


@pytest.mark.parametrize("trait", ["windowed", "flash", "dynamic", "longrope"])
def test_what_graphs_cannot_do_is_said(model, trait):
    if trait in ("windowed", "flash"):
        setattr(model, trait, True)
    else:
        model.lm.config.rope_parameters["rope_type"] = trait
    prepare_sampling(model, "auto")
    with pytest.raises(ValueError, match=r"sampling\.compile=true: not for layers with a window or FlashAttention"):
        prepare_sampling(model, "true")


def test_two_samplers_at_once_share_no_memory(model):
    settings = {"cache": "prefix", "block_length": 4}
    plain = filled(model, **settings)
    model.static = StaticForward(model.decode, "true", capture)
    config = SamplingConfig(steps=12, stop_at_eos=False, batch_size=1, **settings)
    canvas = Canvas.after(*PROMPTS[0], model.mask_token_id)
    first = fill(model, [canvas, canvas], config, model.special_tokens)
    next(first)
    assert filled(model, **settings) == plain
    assert next(first).tokens == plain[0][0]


def test_long_forwards_and_new_shapes_are_not_captured(model, monkeypatch):
    model.static = StaticForward(model.decode, "true", capture)
    monkeypatch.setattr(static_forward, "MOST_POSITIONS", 10)
    filled(model)
    assert not model.static.graphs
    monkeypatch.setattr(static_forward, "MOST_POSITIONS", 1000)
    filled(model, steps=static_forward.CAPTURED_AT - 1)
    assert not model.static.graphs
    monkeypatch.setattr(static_forward, "MOST_GRAPHS", 1)
    filled(model)
    assert len(model.static.graphs) == 1


def test_shapes_of_long_ago_are_not_captured(monkeypatch):
    monkeypatch.setattr(static_forward, "RECENT", 20)
    together, scattered = ([width for _ in range(6) for width in range(1, 9)] for _ in range(2))
    together.sort()
    for widths, graphs in ((together, 8), (scattered, 0)):
        static = StaticForward(lambda *_: torch.zeros(1), "true", lambda run: run)
        for width in widths:
            static(torch.zeros(1, width), torch.zeros(1, width), None, None)
        assert len(static.graphs) == graphs
        assert static.seen.total() == len(static.recent) == 20


def test_likelihoods_are_not_captured(model):
    model.static = StaticForward(model.decode, "true", capture)
    for _ in range(10):
        score(model, [5, 6], [7, 8], model.special_tokens, 8)
    assert not model.static.seen


def test_numbers_that_are_none_do_not_stay(model):
    """Keys and values of a failed forward are in memory that the next sampler takes."""
    model.block_length = 4
    plain = filled(model)
    model.static = StaticForward(model.decode, "true", None)
    values = model.lm.get_decoder().layers[0].self_attn.v_proj.weight.data
    sound = values.clone()
    sampler = Sampler(model, SamplingConfig(stop_at_eos=False), model.special_tokens)
    sampler.add(Canvas.after(*PROMPTS[0], model.mask_token_id))
    for _ in range(9):  # into the last block
        sampler.step()
    values.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        sampler.step()
    del sampler
    values.copy_(sound)
    assert filled(model) == plain


def test_a_thread_has_the_settings_of_the_compiler(monkeypatch):
    monkeypatch.setattr(static_forward, "backend_of", lambda _: "eager")
    rating, limits = compiled_rating("true"), []

    def work():
        rating(torch.randn(3, 9), None, None, SamplingConfig())
        limits.append(torch._dynamo.config.recompile_limit)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert limits == [RECOMPILATIONS]


def test_memory_that_a_capture_lacks_is_named(model):
    def exhaust(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.static = StaticForward(model.decode, "auto", exhaust)
    with pytest.raises(MemoryError, match=r"lower sampling\.batch_size"):
        filled(model)
    assert model.static.capture is exhaust


def test_what_cannot_be_captured_runs_as_it_is(model):
    def refuse(_):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    plain = filled(model)
    model.static = StaticForward(model.decode, "auto", refuse)
    with pytest.warns(UserWarning, match=r"^no CUDA graphs, which is slower: operation not permitted .* capturing$"):
        assert filled(model) == plain
    model.static = StaticForward(model.decode, "true", refuse)
    with pytest.raises(ValueError, match=r"compile=true: no CUDA graph can be captured \(operation .*\); set auto"):
        filled(model)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_ratings_in_compiled_code(monkeypatch, backend):
    """One compilation is for any number of candidates above 1, and changes no logit."""
    monkeypatch.setattr(static_forward, "backend_of", lambda _: backend)
    torch._dynamo.reset()
    counters.clear()
    rating = compiled_rating("true")
    for alg, top_k in (("entropy", None), ("topk_margin", None), ("maskgit_plus", 4)):
        config = SamplingConfig(alg=alg, temperature=0.5 if top_k else 0, top_k=top_k, confidence="scaled")
        for n in (5, 9, 2, 1):
            logits, uniforms = torch.randn(n, 50), torch.rand(n) if top_k else None
            logits[:, 7] = -torch.inf
            kept = logits.clone()
            found = propose(logits, uniforms, config, rating)
            assert torch.equal(logits, kept)
            torch.testing.assert_close(found, propose(kept, uniforms, config))
    assert counters["stats"]["unique_graphs"] == 3 * 2


@pytest.mark.slow
def test_layers_share_their_compilations(tokenizer, monkeypatch):
    """Each has memory of its own for keys and values, whose number the compiler must not see."""
    monkeypatch.setattr(static_forward, "backend_of", lambda _: "eager")
    compilations = []
    for layers in (1, 4):
        model = new_model(small_shape(initializer_range=0.3, num_hidden_layers=layers), tokenizer).double().eval()
        plain = filled(model, cache="dual", block_length=4)
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = RECOMPILATIONS
        counters.clear()
        compile_sampling(model, "true")
        for _ in range(2):
            assert filled(model, cache="dual", block_length=4) == plain
        compilations.append(counters["stats"]["unique_graphs"])
    assert 0 < compilations[0] == compilations[1] < RECOMPILATIONS


@pytest.mark.parametrize(
    ("setting", "gpu", "forwards", "compiled", "static"),
    [
        ("auto", False, 10**6, False, False),
        ("auto", True, static_forward.WORTH_FORWARDS - 1, False, True),
        ("auto", True, static_forward.WORTH_FORWARDS, True, True),
        ("true", False, 1, True, True),
        ("false", True, 10**6, False, False),
    ],
)
def test_what_is_prepared(model, monkeypatch, setting, gpu, forwards, compiled, static):
    done = []
    monkeypatch.setattr(static_forward, "compile_sampling", lambda *_: done.append(1))
    monkeypatch.setattr(static_forward, "CudaGraphs", lambda _: capture)
    if gpu:
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    prepare_sampling(model, setting, forwards)
    assert (bool(done), model.static is not None) == (compiled, static)
    assert not static or model.static.takes(1) is gpu


def test_the_published_interface_samples_through_graphs(model):
    ids, config = torch.tensor([PROMPTS[0][0]]), SamplingConfig(max_new_tokens=12, steps=12, stop_at_eos=False)
    plain = sample(model, ids, config, model.special_tokens).sequences
    model.static = StaticForward(model.decode, "auto", capture)
    assert torch.equal(sample(model, ids, config, model.special_tokens).sequences, plain)
    assert model.static.graphs
