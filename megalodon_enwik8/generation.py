"""Sampling bytes from a model, and showing them as text while they come."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from megalodon_enwik8.evaluation import reading
from megalodon_enwik8.safety import UserError

_KEPT_CONTROLS = "\n\t"
# Longer prompts are read in pieces of so many bytes, in the memory of one piece.
_PREFILL = 8192
# At this temperature any difference between two logits decides, and float32 overflows below.
COLDEST = 1e-30


class PrintableDecoder:
    """Bytes in, text out that is safe on a screen whatever the bytes are.

    A character cut between two calls waits for its rest; bytes that are not UTF-8, and control
    characters (which could clear the screen or worse), become U+FFFD.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, data: bytes, final: bool = False) -> str:
        text = self._decoder.decode(data, final)
        return "".join(c if c.isprintable() or c in _KEPT_CONTROLS else "\ufffd" for c in text)


class ByteStreamer(BaseStreamer):
    """Passes what `generate` makes, prompt first, as text to `write`, as soon as it is made."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._decoder = PrintableDecoder()

    def put(self, value: torch.Tensor) -> None:
        self._write(self._decoder.decode(bytes(value.flatten().tolist())))

    def end(self) -> None:
        self._write(self._decoder.decode(b"", final=True))


class _Checked(LogitsProcessor):
    """Before each byte calls `check`, and stops at logits that no byte can be drawn from."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.check()
        if not torch.isfinite(scores.amax()):
            raise UserError(
                "the model's output is not finite: its weights are damaged or the training "
                "diverged; use another checkpoint"
            )
        return scores


def generate_bytes(
    model: PreTrainedModel,
    prompt: bytes,
    *,
    length: int,
    seed: int,
    temperature: float = 1.0,
    min_p: float = 0.0,
    top_k: int | None = None,
    streamer: BaseStreamer | None = None,
    check: Callable[[], None] = lambda: None,
) -> bytes:
    """`length` new bytes after a prompt of at least one byte, a pure function of the arguments.

    temperature 0 takes the likeliest byte each time. A vocabulary wider than 256 is cut to the
    bytes. Reseeds torch's generator; the model's mode is restored. `check` is called before each
    byte, and may raise.

    Raises UserError when the model's output is not finite.
    """
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    input_ids = torch.frombuffer(bytearray(prompt), dtype=torch.uint8).long()[None].to(device)
    options: dict[str, Any] = {"do_sample": temperature > COLDEST}
    if temperature > COLDEST:
        options |= {"temperature": temperature, "min_p": min_p, "top_k": top_k or 0, "top_p": 1.0}
    with reading(model):
        output = cast(Any, model).generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=length,
            suppress_tokens=list(range(256, model.config.vocab_size)) or None,
            streamer=streamer,
            prefill_chunk_size=_PREFILL if len(prompt) > _PREFILL else None,
            logits_processor=LogitsProcessorList([_Checked(check)]),
            **options,
        )
    return bytes(output[0, len(prompt) :].tolist())
