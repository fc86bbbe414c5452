"""The byte tokenizer: every byte string there and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    LlamaConfig,
)

from megalodon import MegalodonConfig, MegalodonTokenizer

pytestmark = pytest.mark.usefixtures("no_warnings")

PLAIN = MegalodonTokenizer()
LOSSLESS = MegalodonTokenizer(errors="surrogateescape")
SPECIAL = MegalodonTokenizer(
    bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=["<|sep|>", "é"]
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
SPECIAL_TEXTS = st.lists(
    st.sampled_from(["<s>", "</s>", "<pad>", "<|sep|>", "é", "<0xC3>", "a", "<", "ß\n", "\x00"])
).map("".join)


@given(st.binary())
def test_every_byte_string_comes_back(data):
    for tokenizer in (PLAIN, LOSSLESS, SPECIAL):
        ids = tokenizer.encode(data)
        assert ids == list(data) == tokenizer(data).input_ids
        assert tokenizer.decode_bytes(ids) == data
        assert tokenizer.decode_bytes(torch.tensor(ids, dtype=torch.int64)) == data


@given(st.binary())
def test_every_byte_string_comes_back_as_text_that_escapes_what_is_no_utf8(data):
    ids = list(data)
    text = LOSSLESS.decode(ids)
    assert LOSSLESS.encode(text) == PLAIN.encode(text) == ids
    assert PLAIN.decode(ids, errors="surrogateescape") == text
    PLAIN.decode(ids).encode()  # the default can always be printed
    assert LOSSLESS.convert_tokens_to_string(LOSSLESS.convert_ids_to_tokens(ids)) == text


@given(TEXTS)
def test_a_text_is_its_utf8_bytes_and_nothing_more(text):
    ids = PLAIN(text)["input_ids"]
    assert ids == list(text.encode())
    assert PLAIN.decode(ids) == text
    assert PLAIN.convert_tokens_to_ids(PLAIN.tokenize(text)) == ids
    assert PLAIN(text)["attention_mask"] == [1] * len(ids)


@given(SPECIAL_TEXTS)
def test_special_tokens_are_one_id_each_and_come_back(text):
    ids = SPECIAL.encode(text)
    assert SPECIAL.decode(ids) == text
    rest = text
    for token in ("<s>", "</s>", "<pad>", "<|sep|>", "é"):
        assert ids.count(SPECIAL.convert_tokens_to_ids(token)) == rest.count(token)
        rest = rest.replace(token, "\x01")
    assert SPECIAL.decode(ids, skip_special_tokens=True) == rest.replace("\x01", "")


@given(SPECIAL_TEXTS)
def test_special_tokens_in_data_are_only_bytes(text):
    data = text.encode()
    assert SPECIAL.encode(data) == list(data)
    assert SPECIAL(text, split_special_tokens=True).input_ids == list(data)
    assert SPECIAL([data, text.encode()])["input_ids"] == [list(data)] * 2


def test_ids_are_the_bytes_and_special_tokens_stand_above():
    assert PLAIN.vocab_size == len(PLAIN) == 256
    names = [chr(i) if i < 128 else f"<0x{i:02X}>" for i in range(256)]
    assert PLAIN.get_vocab() == {name: i for i, name in enumerate(names)}
    assert PLAIN.convert_ids_to_tokens(list(range(256))) == names
    assert PLAIN.all_special_ids == [0]
    assert len(SPECIAL) == len(SPECIAL.get_vocab()) == 261
    assert sorted(SPECIAL.all_special_ids) == list(range(256, 261))


def test_byte_0_ends_and_pads_and_is_a_byte_all_the_same():
    assert PLAIN.eos_token_id == PLAIN.pad_token_id == 0
    assert PLAIN.bos_token_id is None
    text = "a\x00b<0x00>"
    ids = PLAIN.encode(text)
    assert ids == list(text.encode())
    assert PLAIN.decode_bytes(ids) == text.encode()
    assert PLAIN.decode(ids) == text
    assert PLAIN.decode(ids, skip_special_tokens=True) == "ab<0x00>"
    assert PLAIN.decode_bytes(ids, skip_special_tokens=True) == b"ab<0x00>"
    # What programs do that end texts themselves: by name, by id, or by what the id decodes to.
    for end in (PLAIN.eos_token, PLAIN.decode(PLAIN.eos_token_id)):
        for tokenizer in (PLAIN, MegalodonTokenizer(extra_special_tokens=["<|sep|>"])):
            assert tokenizer.encode("é" + end) == [195, 169, 0]


def test_a_special_token_named_like_a_byte_is_that_byte():
    tokenizer = MegalodonTokenizer(pad_token="<0xFF>", eos_token="\n")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (255, 10, 256)
    assert tokenizer.encode("a\nb<0xFF>") == [97, 10, 98, 255]
    assert tokenizer.decode([97, 10, 0, 98]) == "a\n\x00b"
    assert tokenizer.decode([97, 10, 255, 98], skip_special_tokens=True) == "ab"


def test_padding_stands_on_the_left_and_is_masked():
    batch = PLAIN(["abc", "é", b"\xff"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [[97, 98, 99], [0, 195, 169], [0, 0, 255]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    right = PLAIN(["abc", "d"], padding=True, padding_side="right")
    assert right["input_ids"] == [[97, 98, 99], [100, 0, 0]]
    cut = PLAIN(["abc", "d"], padding="max_length", max_length=2, truncation=True)
    assert cut["input_ids"] == [[97, 98], [0, 100]]


def test_collators_pad_with_nothing_set_by_hand():
    rows = [PLAIN("ab"), PLAIN("c")]
    batch = DataCollatorWithPadding(PLAIN)(rows)
    assert batch["input_ids"].tolist() == [[97, 98], [0, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]
    batch = DataCollatorForLanguageModeling(PLAIN, mlm=False)(rows)
    assert batch["labels"].tolist() == [[97, 98], [-100, 99]]


def test_arguments_of_other_tokenizers_are_taken():
    tokenizer = MegalodonTokenizer()
    assert tokenizer.encode("ab", None, False) == [97, 98]
    assert tokenizer("ab", None, None, None, True)["input_ids"] == [97, 98]
    options = {"spaces_between_special_tokens": True, "use_source_tokenizer": False}
    assert tokenizer.decode([97, 0, 98], **options) == "a\0b"
    assert tokenizer.batch_decode([[97], [98]], **options) == ["a", "b"]


def test_pairs_are_one_text_after_the_other():
    assert PLAIN.encode("ab", "c") == [97, 98, 99]
    assert PLAIN([("a", "b"), ("c", b"d")])["input_ids"] == [[97, 98], [99, 100]]


def test_empty_texts_are_empty():
    for empty in ("", b""):
        assert PLAIN.encode(empty) == []
        assert PLAIN(["a", empty])["input_ids"] == [[97], []]
    assert PLAIN.decode([]) == ""
    assert PLAIN.decode_bytes([]) == b""


@pytest.mark.parametrize("config", [MegalodonConfig(num_layers=1), LlamaConfig()])
def test_auto_tokenizer_brings_it_back_as_it_was(tmp_path, config):
    tokenizer = MegalodonTokenizer(
        errors="strict",
        special_tokens_pattern="bos_eos",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="\x00",
        padding_side="right",
        chat_template="{% for m in messages %}<s>{{ m['content'] }}{% endfor %}",
    )
    tokenizer.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is MegalodonTokenizer
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert (again.padding_side, again.errors) == ("right", "strict")
    assert again("é").input_ids == tokenizer("é").input_ids == [256, 195, 169, 257]
    chat = [{"role": "user", "content": "hi"}]
    assert again.apply_chat_template(chat, return_dict=False) == [256, 104, 105]
    with pytest.raises(UnicodeDecodeError):
        again.decode([255])


def test_defaults_come_back_too(tmp_path):
    PLAIN.save_pretrained(tmp_path)
    MegalodonConfig(num_layers=1).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.padding_side, again.errors, len(again)) == ("left", "replace", 256)
    assert (again.pad_token_id, again.eos_token_id, again.all_special_ids) == (0, 0, [0])
    assert again.encode("é<0x00>") == [195, 169, *b"<0x00>"]
    MegalodonTokenizer(eos_token=None, pad_token=None).save_pretrained(tmp_path)
    assert not AutoTokenizer.from_pretrained(tmp_path).all_special_ids
    padded = AutoTokenizer.from_pretrained(tmp_path, pad_token="\n")
    assert padded(["a", "bc"], padding=True)["input_ids"] == [[10, 97], [98, 99]]


class TestBadInput:
    def test_an_id_outside_the_vocabulary(self):
        for tokenizer, bad in ((PLAIN, 256), (PLAIN, -100), (SPECIAL, 261)):
            for convert in (tokenizer.decode, tokenizer.decode_bytes):
                with pytest.raises(ValueError, match=f"{bad} is no id of this tokenizer"):
                    convert([97, bad])
            with pytest.raises(ValueError, match=f"{bad} is no id of this tokenizer"):
                tokenizer.convert_ids_to_tokens([bad])

    def test_a_surrogate_that_stands_for_no_byte(self):
        with pytest.raises(UnicodeEncodeError):
            PLAIN.encode("a\ud800")

    def test_an_unknown_token_has_no_id(self):
        assert PLAIN.convert_tokens_to_ids("<0x41>") is None
