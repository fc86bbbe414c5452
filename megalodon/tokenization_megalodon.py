"""Text as bytes: a tokenizer whose ids 0 to 255 are the bytes 0 to 255."""

from typing import Any

from torch import Tensor
from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer
from transformers.utils.generic import to_py_obj

from .remote_code import TOKENIZER_AUTO_MAP, TOKENIZER_FILE, write_imports

NUM_BYTES = 256
NUM_ASCII = 128


class MegalodonTokenizer(PreTrainedTokenizer):
    """A text is its UTF-8 bytes, one id each; nothing is added to it.

    Every byte string has its place: ``tokenizer(data)`` and ``tokenizer.encode(data)`` take
    ``bytes`` wherever they take ``str`` and never read them as special tokens, and
    :meth:`decode_bytes` gives them back. Where the bytes are no UTF-8, a ``str`` can hold them as
    Python's file names do: ``decode(ids, errors="surrogateescape")`` loses nothing, and encoding
    such a text gives the same bytes again.

    Byte 0, which no text holds, ends texts and pads them: it is the `eos_token` and the
    `pad_token`, and still a byte. Where a text holds it all the same it is encoded as 0 and
    :meth:`decode_bytes` gives it back; ``skip_special_tokens=True`` leaves it out, as it does any
    end and padding.

    The token of an ASCII byte is called by its character, that of byte 233 ``<0xE9>``. A special
    token that is named like a byte is that byte; any other takes the next free id from 256 on,
    for which the model needs ``resize_token_embeddings``. Padding stands on the left, where
    generation wants it. The `stop_strings` of ``generate``, which looks at tokens one by one, find
    ASCII only.

    A folder that it is saved to also serves ``trust_remote_code=True``: see ``remote_code``.

    Args:
        eos_token, pad_token: ``None`` for none.
        errors: what ``decode`` does with bytes that are not UTF-8, as in ``bytes.decode``. The
            default, ``replace``, gives a text that can always be printed.
        special_tokens_pattern: which special tokens each text gets, as transformers names them:
            ``bos``, ``eos``, ``bos_eos``; ``None`` for none.
        kwargs: ``bos_token``, ``padding_side`` and what else tokenizers of transformers take.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    def __init__(
        self,
        errors: str = "replace",
        special_tokens_pattern: str | None = None,
        eos_token: str | AddedToken | None = "\0",
        pad_token: str | AddedToken | None = "\0",
        **kwargs: Any,
    ) -> None:
        self.errors = errors
        self._byte_tokens = [
            chr(byte) if byte < NUM_ASCII else f"<0x{byte:02X}>" for byte in range(NUM_BYTES)
        ]
        self._byte_ids = {token: byte for byte, token in enumerate(self._byte_tokens)}
        options = {"errors": errors, "special_tokens_pattern": special_tokens_pattern}
        super().__init__(eos_token=eos_token, pad_token=pad_token, **options, **kwargs)
        # transformers saves only what is noted here, and these it does not note.
        self.init_kwargs["special_tokens_pattern"] = special_tokens_pattern
        self.init_kwargs["auto_map"] = TOKENIZER_AUTO_MAP

    @property
    def vocab_size(self) -> int:
        """The bytes; ``len(tokenizer)`` counts added tokens too."""
        return NUM_BYTES

    def get_vocab(self) -> dict[str, int]:
        return {**self._byte_ids, **self.added_tokens_encoder}

    def decode_bytes(
        self, token_ids: int | list[int] | Tensor, skip_special_tokens: bool = False
    ) -> bytes:
        """The bytes of one sequence of ids, exactly. Added tokens are written out by name.

        Raises:
            ValueError: for an id that is neither a byte nor an added token.
        """
        ids = to_py_obj(token_ids)
        ids = [ids] if isinstance(ids, int) else ids
        if skip_special_tokens:
            skipped = set(self.all_special_ids)
            ids = [i for i in ids if i not in skipped]
        try:
            return bytes(ids)
        except ValueError:  # added tokens
            return b"".join(map(self._id_to_bytes, ids))

    def _id_to_bytes(self, index: int) -> bytes:
        if 0 <= index < NUM_BYTES:
            return bytes([index])
        if index not in self.added_tokens_decoder:
            raise ValueError(
                f"{index} is no id of this tokenizer: it has {NUM_BYTES} bytes and "
                f"{len(self) - NUM_BYTES} added tokens"
            )
        return self.added_tokens_decoder[index].content.encode()

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> BatchEncoding:
        """transformers' own, which takes ``bytes`` wherever it takes ``str``."""
        texts = (text, text_pair, text_target, text_pair_target)
        return super().__call__(*(self._as_ids(each, kwargs) for each in texts), *args, **kwargs)

    def encode(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> list[int]:
        """transformers' own, which takes ``bytes`` wherever it takes ``str``."""
        texts = (text, text_pair)
        return super().encode(*(self._as_ids(each, kwargs) for each in texts), *args, **kwargs)

    def _as_ids(self, item: Any, options: dict[str, Any]) -> Any:
        """Bytes as their ids, and texts too where no added token but an ASCII byte, which is itself
        in any case, can occur: without a list of names between."""
        if isinstance(item, (bytes, bytearray, memoryview)):
            return list(bytes(item)) or ""
        if isinstance(item, str):
            split = options.get("split_special_tokens", self.split_special_tokens)
            others = options.get("is_split_into_words") or options.get("sanitize_control_tokens")
            plain = (split or max(self.added_tokens_decoder, default=0) < NUM_ASCII) and not others
            return list(item.encode(errors="surrogateescape")) or "" if plain else item
        if isinstance(item, (list, tuple)) and item and not isinstance(item[0], int):
            return type(item)(self._as_ids(part, options) for part in item)
        return item

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._byte_tokens[byte] for byte in text.encode(errors="surrogateescape")]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._byte_ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        self._id_to_bytes(index)  # refuses what is no id
        return self._byte_tokens[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        data = b"".join(
            bytes([self._byte_ids[token]]) if token in self._byte_ids else token.encode()
            for token in tokens
        )
        return data.decode(errors=self.errors)

    def decode(  # type: ignore[override]
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str | None = None,
        spaces_between_special_tokens: bool | None = None,
        use_source_tokenizer: bool | None = None,
    ) -> str | list[str]:
        """The text of one sequence of ids, or those of several; errors as in ``bytes.decode``. The
        last two, which other tokenizers take, mean nothing here: no space is put anywhere."""
        ids = to_py_obj(token_ids)
        options = (skip_special_tokens, clean_up_tokenization_spaces, errors)
        if isinstance(ids, (list, tuple)) and ids and isinstance(ids[0], (list, tuple)):
            return [str(self.decode(sequence, *options)) for sequence in ids]
        data = self.decode_bytes(ids, skip_special_tokens)
        text = data.decode(errors=self.errors if errors is None else errors)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """There is no vocabulary to save, but the file that `trust_remote_code` runs."""
        return (write_imports(save_directory, TOKENIZER_FILE),)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoTokenizer") -> None:
        """Nothing: it would make transformers save a copy of this file where it is loaded by
        `trust_remote_code`."""
