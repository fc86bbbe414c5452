import pytest
import torch
import torch._dynamo.testing
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode

from megalodon import MegalodonCache
from megalodon.ops import chunk_attention

from .models import CHUNK, tiny_model


@torch.no_grad()
def test_compiled_layers_decode_at_every_place_of_a_chunk_with_few_compilations():
    eager, compiled = tiny_model(), tiny_model()
    counter = torch._dynamo.testing.CompileCounter()
    for layer in compiled.model.layers:
        layer.compile(backend=counter)
    text = torch.randint(0, 256, (2, 3 * CHUNK + 2))
    caches = [MegalodonCache(model.config) for model in (eager, compiled)]
    for token in text.split(1, dim=1):
        expected, found = (
            model(token, cache=cache).logits
            for model, cache in zip((eager, compiled), caches, strict=True)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # Without a state, at the first place of a chunk, at the second, at any other.
    assert counter.frame_count <= 5


# Value heads are larger than those of queries and keys, or smaller.
@pytest.mark.parametrize(("scores_limit", "value_dim"), [(512, 24), (0, 24), (0, 12)])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_layers_have_the_gradients_of_eager_ones(
    autocast, scores_limit, value_dim, monkeypatch
):
    monkeypatch.setattr(chunk_attention, "SCORES_LIMIT", scores_limit)
    options = {"rescale_nffn": True, "value_dim": value_dim}
    eager, compiled = tiny_model(**options), tiny_model(**options)
    for layer in compiled.model.layers:
        layer.compile(backend="aot_eager_decomp_partition", fullgraph=True)
    ids = torch.randint(0, 256, (2, 2 * CHUNK + 3))
    for model in (eager, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
    bound = 1e-2 if autocast else 1e-5  # of each gradient's norm; a rounding to bfloat16 is 4e-3
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= bound * theirs.grad.norm()


@torch.no_grad()
@pytest.mark.parametrize("base", [10_000.0, 50.0])
def test_the_whole_model_is_one_graph_and_can_be_exported(base):
    model, ids = tiny_model(rope_base=base), torch.randint(0, 256, (2, 2 * CHUNK + 3))
    options = {"use_cache": False, "return_dict": False}
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # before it ever ran
    compiled(ids, **options)
    (expected,) = model(ids, **options)
    first, rest = compiled(ids[:, :-1]), compiled(ids[:, -1:], cache=MegalodonCache(model.config))
    further = compiled(ids[:, -1:], cache=first.cache)
    torch.testing.assert_close(further.logits[:, 0], expected[:, -1], rtol=0, atol=1e-5)
    assert not torch.allclose(rest.logits[:, 0], expected[:, -1])
    exported = torch.export.export(model, (ids,), options).module()
    for program in (compiled, exported):
        torch.testing.assert_close(program(ids, **options)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.slow  # compiles C++
def test_a_second_start_finds_its_compiled_layers_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    ids = torch.randint(0, 256, (2, 2 * CHUNK))
    for found in (0, 1):
        torch._dynamo.reset()
        counters.clear()
        model = tiny_model()
        for layer in model.model.layers:
            layer.compile(fullgraph=True, dynamic=False)
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert counters["aot_autograd"]["autograd_cache_hit"] == found
        assert counters["aot_autograd"]["autograd_cache_bypass"] == 0


def kept_by_a_compiled_layer():
    """The shapes of what it keeps for its backward, of two chunks, and its configuration."""
    model, kept = tiny_model(num_layers=1).train(), []
    model.model.layers[0].compile(backend="aot_eager_decomp_partition", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model(torch.randint(0, 256, (1, 2 * CHUNK)), use_cache=False)
    return kept, model.config


def test_a_compiled_layer_keeps_neither_scores_nor_products_behind_gates():
    kept, config = kept_by_a_compiled_layer()
    assert not [shape for shape in kept if shape[-2:] == (CHUNK, CHUNK)]
    hidden = (2 * CHUNK, config.ffn_hidden_dim)
    assert kept.count(hidden) == 2  # gate and value, but not their product


def test_a_compiled_layer_keeps_what_attention_gives_but_not_what_it_takes(monkeypatch):
    monkeypatch.setattr(chunk_attention, "SCORES_LIMIT", 0)
    kept, config = kept_by_a_compiled_layer()
    size = config.value_dim // config.num_heads
    assert kept.count((2, config.num_heads, CHUNK, size)) == 1


def test_what_was_compiled_or_traced_for_reading_is_of_no_harm_to_later_calls():
    ids = torch.randint(0, 256, (2, CHUNK + 3))
    expected = tiny_model()(ids).logits
    model = tiny_model()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model(fake.from_tensor(ids), use_cache=False)
    assert torch.equal(model(ids).logits, expected)
    model = tiny_model(num_layers=1)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.inference_mode():
        compiled(ids, use_cache=False)
    compiled.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
