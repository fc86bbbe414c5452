import pytest
import torch

from megalodon.ops import chunk_attention as module
from megalodon.ops.chunk_attention import (
    AttentionState,
    apply_rotary,
    apply_rotary_reference,
    chunk_attention,
    chunk_attention_reference,
    rotary_table,
)

from .gradients import assert_same

C = 8
LENGTHS = [1, C - 1, C, C + 1, 3 * C, 3 * C + 7]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def qkv(length, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(2, length, 3, size, dtype=dtype) for size in (4, 4, 6)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kernel", ["scores", "sdpa"])
@pytest.mark.parametrize("length", LENGTHS)
def test_fast_form_equals_token_by_token(length, kernel, dtype, monkeypatch):
    monkeypatch.setattr(module, "SCORES_LIMIT", 512 if kernel == "scores" else 0)
    assert_same(
        lambda q, k, v: chunk_attention(q, k, v, C)[0],
        lambda q, k, v: chunk_attention_reference(q, k, v, C),
        qkv(length, dtype),
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("kernel", ["scores", "sdpa"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("offset", [1, C - 1])
def test_continuing_in_a_chunk_equals_the_whole(offset, length, kernel, monkeypatch):
    monkeypatch.setattr(module, "SCORES_LIMIT", 512 if kernel == "scores" else 0)

    def pieces(q, k, v):
        first = [x[:, :offset] for x in (q, k, v)]
        y0, state = chunk_attention(*first, C, return_state=True)
        rest = [x[:, offset:] for x in (q, k, v)]
        y1, state = chunk_attention(*rest, C, state=state, offset=offset, return_state=True)
        return torch.cat([y0, y1], dim=1), state

    def whole(q, k, v):
        return chunk_attention(q, k, v, C, return_state=True)

    assert_same(pieces, whole, qkv(offset + length), 1e-10)


def test_decoding_rows_at_different_places_equals_the_whole():
    q, k, v = qkv(2 * C + 3)
    whole, _ = chunk_attention(q, k, v, C)
    state = AttentionState(k.new_zeros(2, C, 3, 4), v.new_zeros(2, C, 3, 6))
    places = torch.tensor([0, 5])
    _, before = chunk_attention(q[:, :5], k[:, :5], v[:, :5], C, return_state=True)
    state.keys[1], state.values[1] = before.keys[1], before.values[1]
    with torch.no_grad():
        for step in range(2 * C - 2):
            at = places + step
            rows = [x[torch.arange(2), at].unsqueeze(1) for x in (q, k, v)]
            y, state = chunk_attention(*rows, C, state=state, offset=at % C)
            torch.testing.assert_close(y[:, 0], whole[torch.arange(2), at])


@pytest.mark.parametrize("offset", [3, torch.tensor([0, 3])])
def test_decoding_writes_into_the_state_without_a_new_allocation(offset):
    q, k, v = qkv(1)
    state = AttentionState(k.new_zeros(2, C, 3, 4), v.new_zeros(2, C, 3, 6))
    with torch.no_grad():
        _, after = chunk_attention(q, k, v, C, state=state, offset=offset, return_state=True)
    assert after is not None
    assert after.keys.data_ptr() == state.keys.data_ptr()
    assert after.values.data_ptr() == state.values.data_ptr()


def test_attention_dropout_keeps_the_mean(monkeypatch):
    q, k, v = (x.expand(500, -1, -1, -1) for x in (t[:1] for t in qkv(C)))
    expected, _ = chunk_attention(q, k, v, C)
    monkeypatch.setattr(module, "SCORES_LIMIT", 0)
    for fused in (False, True):
        dropped, _ = chunk_attention(q, k, v, C, dropout=0.5, fused=fused)
        assert not torch.allclose(dropped, expected)
        torch.testing.assert_close(dropped.mean(0), expected.mean(0), rtol=0, atol=0.3)


def test_the_rotary_table_is_exact_at_every_place_of_a_long_chunk():
    """Position m turns pair i by m base^(-2i/d) (arXiv 2104.09864), to the last digit."""
    angle = torch.arange(4096).double()[:, None] * 1e5 ** -(torch.arange(8).double() / 8)
    expected = torch.stack([angle.cos(), -angle.sin(), angle.sin()], 1).float()
    torch.testing.assert_close(rotary_table(4096, 16, 1e5), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rotary_embedding_equals_its_reference(dtype):
    x, table = torch.randn(2, 5, 2, 3, 8, dtype=dtype), rotary_table(5, 8, 10_000.0).unsqueeze(1)

    def run(operation):
        return lambda x: operation(x, table)

    assert_same(run(apply_rotary), run(apply_rotary_reference), [x], 1e-6)
