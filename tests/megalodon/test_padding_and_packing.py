"""A row is worth the same whatever stands beside it: padding and packing change nothing."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from megalodon.ops import cema

from .models import CHUNK, tiny_model

LENGTHS = [
    [1, CHUNK, CHUNK + 1],
    [3 * CHUNK + 2, 2, CHUNK - 1],
    [2 * CHUNK, 2 * CHUNK, 5],
    [4 * CHUNK + 7, 3 * CHUNK + 1, 1],
]


def texts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=generator) for n in lengths]


def pad(rows, side):
    """Rows padded with a token that is not neutral, and their mask."""
    width = max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return ids, mask


def random_lengths(seed, count, longest):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(1, longest + 1, (count,), generator=generator)).tolist()


@pytest.fixture(params=["small blocks", "shipped blocks"])
def model(request, monkeypatch):
    """With CEMA blocks of 4 as well, so that short texts have many of them."""
    if request.param == "small blocks":
        monkeypatch.setattr(cema, "BLOCK", 4)
        monkeypatch.setattr("megalodon.layout.BLOCK", 4)
    return tiny_model()


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logit(model, side, seed):
    rows = texts(LENGTHS[seed] + random_lengths(seed, 3, 4 * CHUNK))
    ids, mask = pad(rows, side)
    logits = model(ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        alone = model(row[None]).logits[0]
        torch.testing.assert_close(logits[i, mask[i].bool()], alone, rtol=0, atol=1e-5)
    assert not logits[~mask.bool()].any()


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_padding_anywhere_and_continued_in_pieces(model, seed):
    """Holes inside rows, pieces of any size, rows that get nothing in a piece."""
    generator = torch.Generator().manual_seed(seed)
    width = 6 * CHUNK
    ids = torch.randint(0, 256, (4, width), generator=generator)
    mask = torch.rand(4, width, generator=generator) < 0.6
    mask[0, : 3 * CHUNK] = False
    mask[1, CHUNK : 5 * CHUNK] = False
    mask[2] = True
    cuts = torch.randperm(width - 1, generator=generator)[:5].add(1).sort().values.tolist()
    cache, logits = None, []
    for start, stop in zip([0, *cuts], [*cuts, width], strict=True):
        # The mask may cover what the cache has seen, or only the new tokens.
        seen = mask[:, :stop] if start % 2 else mask[:, start:stop]
        output = model(ids[:, start:stop], attention_mask=seen.long(), cache=cache, use_cache=True)
        cache = output.cache
        logits.append(output.logits)
    for i in range(4):
        alone = model(ids[i, mask[i]][None]).logits[0]
        torch.testing.assert_close(torch.cat(logits, 1)[i, mask[i]], alone, rtol=0, atol=1e-5)
    assert cache.lengths.tolist() == mask.sum(1).tolist()


@torch.no_grad()
def test_a_mask_cannot_hide_what_a_cache_has_read(model):
    ids, mask = torch.randint(0, 256, (2, CHUNK)), torch.ones(2, CHUNK + 1)
    mask[1, 2] = 0
    cache = model(ids, use_cache=True).cache
    with pytest.raises(ValueError, match=r"attention_mask hides tokens that the cache has read"):
        model(ids[:, :1], attention_mask=mask, cache=cache)
    # But a row may begin with a new text.
    mask[1, :CHUNK] = 0
    positions = torch.tensor([[CHUNK], [0]])
    logits = model(ids[:, :1], attention_mask=mask, position_ids=positions, cache=cache).logits
    torch.testing.assert_close(logits[1], model(ids[1:, :1]).logits[0], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_left_padded_greedy_generation_equals_each_prompt_alone(model, seed):
    rows = texts(random_lengths(seed + 10, 4, 3 * CHUNK), seed)
    ids, mask = pad(rows, "left")
    together = model.generate(
        ids, attention_mask=mask, max_new_tokens=2 * CHUNK + 3, do_sample=False
    )
    for i, row in enumerate(rows):
        alone = model.generate(row[None], max_new_tokens=2 * CHUNK + 3, do_sample=False)
        assert torch.equal(together[i, ids.shape[1] :], alone[0, len(row) :])


@pytest.mark.parametrize("seed", range(4))
def test_packed_documents_equal_the_documents_alone(model, seed):
    """Logits, loss and gradients; two rows of several documents each."""
    model = model.double()
    rows = [texts(random_lengths(seed + 20, 5, 3 * CHUNK), seed) for _ in range(2)]
    rows[1] = [texts([sum(len(d) for d in rows[0])], 9)[0]]
    first = sum(len(d) for d in rows[0]) // 3
    rows[1] = list(rows[1][0].tensor_split([first, first + 1, first + 2]))
    ids = torch.stack([torch.cat(documents) for documents in rows])
    positions = torch.stack([torch.cat([torch.arange(len(d)) for d in row]) for row in rows])
    # A document of one token has nothing to predict, and no loss of its own.
    tokens = sum(len(d) - 1 for row in rows for d in row)
    counted = ids[:, 1:].numel()  # by Trainer, which does not know of documents
    packed = model(
        ids, labels=ids, position_ids=positions, use_cache=True, num_items_in_batch=counted
    )
    packed.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    total = torch.zeros(())
    for i, row in enumerate(rows):
        at = 0
        for document in row:
            alone = model(document[None], labels=document[None], num_items_in_batch=tokens)
            found = packed.logits[i, at : at + len(document)]
            torch.testing.assert_close(found, alone.logits[0], rtol=0, atol=1e-9)
            total = total + alone.loss
            at += len(document)
    total.backward()
    # transformers takes the loss in float32, whatever the logits are.
    torch.testing.assert_close(packed.loss, total)
    alone_gradients = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(gradients, alone_gradients, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_packed_row_goes_on_from_its_last_document(model):
    first, second = texts([2 * CHUNK + 3, CHUNK + 5])
    ids = torch.cat([first, second])[None]
    positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))])[None]
    cache = model(ids, position_ids=positions, use_cache=True).cache
    more = texts([2 * CHUNK], 5)[0][None]
    found = model(more, cache=cache).logits
    whole = model(torch.cat([second[None], more], dim=1)).logits[:, len(second) :]
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_new_document_may_begin_with_a_cache_in_hand(model):
    first, second = texts([2 * CHUNK + 3, CHUNK + 5])
    cache = model(first[None], use_cache=True).cache
    found = model(second[None], cache=cache, position_ids=torch.arange(len(second))[None]).logits
    torch.testing.assert_close(found, model(second[None]).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_training_gives_the_gradients_of_the_rows_alone(model, side):
    model = model.double()
    rows = texts([3 * CHUNK + 1, 5, CHUNK])
    ids, mask = pad(rows, side)
    labels = ids.masked_fill(mask == 0, -100)  # as collators do
    counted, tokens = (labels[:, 1:] != -100).sum(), sum(len(row) - 1 for row in rows)
    model(ids, attention_mask=mask, labels=labels, num_items_in_batch=counted).loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for row in rows:
        model(row[None], labels=row[None], num_items_in_batch=tokens).loss.backward()
    alone = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(gradients, alone, rtol=0, atol=1e-6)


def test_plain_rows_take_the_plain_path():
    """A mask of ones and positions that count up build no index maps at all."""
    model = tiny_model()
    ids = torch.randint(0, 256, (2, 9))
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("megalodon.layout.Segments")
        model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(9)[None])
        model(ids, position_ids=torch.arange(3, 12)[None])


class TestArgumentsOfFlashAttention:
    """What transformers' collator and trl's packing give beside positions, or in their place."""

    SIZES = (CHUNK + 3, 1, 2 * CHUNK, 5)

    def batch(self, **options):
        documents = [{"input_ids": text.tolist()} for text in texts(list(self.SIZES))]
        return dict(DataCollatorWithFlattening(**options)(documents))

    @pytest.mark.parametrize(
        "options",
        [
            {"return_flash_attn_kwargs": True},
            {"return_flash_attn_kwargs": True, "return_position_ids": False},
            {"return_seq_idx": True, "return_position_ids": False},
            {"return_flash_attn_kwargs": True, "return_seq_idx": True},
        ],
        ids=str,
    )
    def test_they_give_what_positions_give(self, options):
        """To the bit, gradients too; the labels are the texts, whose first bytes are left out."""
        model = tiny_model()
        plain, batch = self.batch(), self.batch(**options)
        results = []
        for inputs in (plain, batch):
            model.zero_grad()
            inputs["labels"] = inputs["input_ids"]
            output = model(**inputs)
            output.loss.backward()
            results.append([output.loss, output.logits, *(p.grad for p in model.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        for inputs in (plain, batch):
            inputs.pop("labels")
        assert torch.equal(model.model(**batch)[0], model.model(**plain)[0])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"cu_seq_lens_k": None}, "cu_seq_lens_k=None .* both must be given"),
            ({"cu_seq_lens_k": [0, 4, 33]}, "be equal"),
            ({"cu_seq_lens": [0, 12, 32]}, "rows of 33 tokens: .* rise from 0 to the length"),
            ({"cu_seq_lens": [1, 12, 33]}, "rise from 0"),
            ({"cu_seq_lens": [0, 12, 11, 33]}, "rise from 0"),
            ({"max_length_k": 15}, "must be 16, .* one is 15"),
            ({"position_ids": list(range(33))}, "differ in where documents begin"),
            ({"position_ids": [0, 1]}, "differ in where documents begin"),
            ({"seq_idx": [0] * 33}, "differ in where documents begin"),
            ({"seq_idx": [0] * 3}, r"seq_idx has shape \(1, 3\); it must be \(1, 33\)"),
            ({"attention_mask": [1] * 32 + [0]}, "attention_mask has padding"),
            ({"input_ids": [[1] * 33] * 2}, "for 2 rows of 33 tokens"),
            ({"is_causal": False}, "is_causal=False: a Megalodon is causal"),
            ({"output_router_logits": True}, "output_router_logits=True: .* has no router"),
        ],
        ids=str,
    )
    def test_contradictions_are_refused(self, changes, message):
        batch = self.batch(return_flash_attn_kwargs=True)
        batch.pop("position_ids")
        for key, value in changes.items():
            rows = key in ("position_ids", "seq_idx", "attention_mask")
            tensor = torch.tensor([value] if rows else value) if isinstance(value, list) else value
            keys = ("cu_seq_lens_q", "cu_seq_lens_k") if key == "cu_seq_lens" else (key,)
            batch |= dict.fromkeys(keys, tensor)
        model = tiny_model()
        batch.pop("labels")
        for part in (model, model.model):
            with pytest.raises(ValueError, match=message):
                part(**batch)

    def test_what_holds_in_any_case_may_be_said(self):
        model, (ids, *_) = tiny_model(), texts([5])
        said = {"is_causal": True, "output_router_logits": False, "cu_seq_lens_q": None}
        assert torch.equal(model(ids[None], **said).logits, model(ids[None]).logits)
