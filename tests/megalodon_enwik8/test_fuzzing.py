"""Whatever comes in: a clear line or a right result; never a traceback, a hang or a lost file.

Each property is tried on a few inputs by default and on as many as LONG says with -m slow.
"""

import contextlib
import copy
import gc
import io
import itertools
import random
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import inference
from megalodon_enwik8.checkpoint import load_checkpoint
from megalodon_enwik8.config import MODELS, ExperimentConfig, load_config
from megalodon_enwik8.data import load_corpus
from megalodon_enwik8.generation import generate_bytes
from megalodon_enwik8.models import restore_model
from megalodon_enwik8.run_folder import NEWEST
from megalodon_enwik8.safety import UserError
from megalodon_enwik8.training import train

from .conftest import tiny
from .packing import PACK

LONG = {"configs": 10_000, "checkpoints": 1_000, "corpora": 1_000, "prompts": 1_000}
SHORT = 20
HANG_S = 60


def inputs(kind):
    """Run the test with `examples` = SHORT, and with LONG[kind] under the marker slow."""
    long = pytest.param(LONG[kind], marks=pytest.mark.slow, id=f"{LONG[kind]}_{kind}")
    return pytest.mark.parametrize("examples", [pytest.param(SHORT, id=f"{SHORT}_{kind}"), long])


def hold(examples, check, *arguments, **strategies):
    """Try `check` on so many inputs, none of which may take longer than HANG_S."""
    tried = 0

    @settings(max_examples=examples, database=None)
    @given(**strategies)
    def once(**drawn):
        nonlocal tried
        tried += 1
        with no_longer_than(HANG_S):
            check(*arguments, **drawn)

    once()
    assert tried >= examples, f"hypothesis found no more than {tried} inputs"


@contextlib.contextmanager
def no_longer_than(seconds):
    def hang(*_):
        raise AssertionError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, hang)
    # What hypothesis remembers of thousands of inputs makes a collection last many seconds.
    gc.disable()
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        gc.enable()
        signal.signal(signal.SIGALRM, before)


def one_line(error):
    assert "\n" not in str(error)
    assert len(str(error)) < 1000


def mutated(original, changes):
    """`original` with up to four pieces cut out, put in, repeated or replaced."""
    place = st.integers(0, len(original))

    def apply(edits):
        result = original
        for first, last, new in edits:
            low, high = sorted((first % (len(result) + 1), last % (len(result) + 1)))
            piece = result[low:high] * 2 if new is None else new
            result = result[:low] + piece + result[high:]
        return result

    short_cut = st.tuples(place, st.integers(0, 8)).map(lambda p: (p[0], p[0] + p[1]))
    cut = st.one_of(short_cut, st.tuples(place, place), place.map(lambda p: (p, len(original))))
    edit = st.tuples(cut, st.none() | changes).map(lambda e: (*e[0], e[1]))
    return st.lists(edit, min_size=1, max_size=4).map(apply)


# Configs

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

STRANGE_YAML = [
    "null", "true", "~", "''", "0", "-1", "1", "256", "1e9", "4e-4", ".nan", "-.inf", "0x10",
    "1:60", "2020-01-01", "auto", "skip", "megalodon", "llama", "sample", "[1]", "{a: b}",
    "!!int x", "!!bool x", "!!float ''", "!!timestamp x", "!!binary x", "!!set {a}", "&a x", "*a",
    "!!int ''", "!!map [1]", "2026-99-99",
    "9" * 5000, "!!python/object/apply:os.system [x]", ">\n  x", "'\\0'", '"\\0"', '"\\ud800"',
]  # fmt: skip
yaml_scalars = st.one_of(
    st.sampled_from(STRANGE_YAML),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=8),
)
yaml_lines = st.tuples(
    st.one_of(
        st.sampled_from([*ExperimentConfig.model_fields, "<<", "?", ""]), st.text(max_size=5)
    ),
    yaml_scalars,
).map(": ".join)
yaml_pieces = st.one_of(
    yaml_scalars,
    yaml_lines.map("\n{}\n".format),
    st.sampled_from(list(":#&*!|>'\"%@`{}[],?-\t\n\0\x85\ufeff")),
).map(lambda text: text.encode("utf-8", "surrogatepass"))
configs = st.one_of(
    st.lists(yaml_lines, max_size=8).map(lambda lines: "\n".join(lines).encode("utf-8", "replace")),
    *(
        mutated(path.read_bytes(), st.one_of(yaml_pieces, st.binary(max_size=9)))
        for path in SHIPPED
    ),
)


@inputs("configs")
def test_a_config_of_any_text_is_read_back_from_its_own_file_or_refused_in_a_line(
    examples, tmp_path
):
    def check(text, overrides):
        path = tmp_path / "x.yaml"
        path.write_bytes(text)
        try:
            config = load_config(path, overrides)
        except UserError as error:
            one_line(error)
            return
        path.write_bytes(config.to_yaml().encode())
        assert load_config(path) == config

    override = yaml_lines.map(lambda line: line.replace(": ", "=", 1))
    hold(examples, check, text=configs, overrides=st.lists(override, max_size=1))


# Checkpoints


@pytest.fixture(scope="module", params=MODELS)
def finished(request, text_file, tmp_path_factory):
    """A small run of four steps, and its files."""
    folder = tmp_path_factory.mktemp("finished")
    short = {"num_batches": 4, "validate_every": 0, "val_batches": 1}
    config = tiny(request.param, folder, text_file, **short)
    assert train(config) == 0
    return config, {path.name: path.read_bytes() for path in folder.iterdir()}


def same_weights(one, other):
    return list(one.model_state) == list(other.model_state) and all(
        torch.equal(tensor, other.model_state[name]) for name, tensor in one.model_state.items()
    )


@inputs("checkpoints")
def test_a_damaged_checkpoint_is_read_right_or_refused_and_the_run_goes_on_from_another(
    examples, finished, tmp_path
):
    config, originals = finished
    folder = tmp_path / "run"
    folder.mkdir()
    again = config.model_copy(update={"run_dir": str(folder)})
    newest = folder / "checkpoint_00000004.pt"
    newest.write_bytes(originals[newest.name])
    right = load_checkpoint(newest)
    counter = itertools.count()

    def check(damaged):
        for path in folder.iterdir():
            path.unlink()
        for name, content in originals.items():
            (folder / name).write_bytes(content)
        newest.write_bytes(damaged)
        try:
            loaded = load_checkpoint(newest)
        except UserError as error:
            one_line(error)
        else:
            assert same_weights(loaded, right)
        if next(counter) % 10 == 0:  # the whole way, which takes longer
            assert train(again, resume=NEWEST) == 0
            assert same_weights(load_checkpoint(folder / "final.pt"), right)

    hold(examples, check, damaged=mutated(originals[newest.name], st.binary(max_size=9)))


def spoiled(content):
    """`content` with one value in it, at any depth, replaced, taken out or put in."""
    values = [None, True, -1, 10**30, 1.5, float("nan"), "x", "", b"x", [], {}, {"x": 1}, (), [[]]]
    tensors = [
        torch.ones(2),
        torch.ones(0),
        torch.ones(2).bool(),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2).to_sparse(),
        torch.ones(3, device="meta"),
        torch.ones(1).expand(9, 10**9),
        torch.full((16, 16), torch.inf),
        torch.full((16, 16), 1e30),
    ]
    strange = st.sampled_from([*values, *tensors])

    def spoil(path, value, remove):
        result = copy.deepcopy(content)
        holder, key, here = None, None, result
        for number in path:
            if not isinstance(here, (dict, list)) or not here:
                break
            keys = list(here) if isinstance(here, dict) else range(len(here))
            holder, key = here, keys[number % len(keys)]
            here = here[key]
        if holder is None:
            return value
        if remove and isinstance(holder, dict):
            del holder[key]
        elif isinstance(here, torch.Tensor) and isinstance(value, float):
            holder[key] = torch.full_like(here, value)
        else:
            holder[key] = value
        if remove and isinstance(holder, dict) and value is not None:
            holder["new"] = value
        return result

    path = st.lists(st.integers(0, 30), min_size=1, max_size=5)
    return st.builds(spoil, path, strange, st.booleans())


@inputs("checkpoints")
def test_a_checkpoint_with_strange_content_is_used_or_refused_in_a_line(
    examples, finished, tmp_path
):
    config, originals = finished
    again = config.model_copy(update={"run_dir": str(tmp_path / "run"), "num_batches": 5})
    path = tmp_path / "strange.pt"
    path.write_bytes(originals["checkpoint_00000004.pt"])

    def check(content):
        torch.save(content, path)
        try:
            assert (
                len(generate_bytes(restore_model(load_checkpoint(path)), b"x", length=2, seed=1))
                == 2
            )
        except UserError as error:
            one_line(error)
        try:
            for file in (tmp_path / "run").glob("*"):
                file.unlink()
            assert train(again, resume=path) == 0
        except UserError as error:
            one_line(error)

    hold(examples, check, content=spoiled(torch.load(path, weights_only=True)))


# Corpora

TEXT = b"".join(random.Random(0).choice((b"the ", b"of\n", b"[[", b"]] ")) for _ in range(2000))


@inputs("corpora")
def test_a_damaged_corpus_is_read_right_or_refused_in_a_line(examples, tmp_path):
    def check(damaged, data_bytes):
        suffix, content = damaged
        path = tmp_path / f"corpus{suffix}"
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # zipfile warns of some damage before it raises
                corpus = load_corpus(str(path), data_bytes)
        except UserError as error:
            one_line(error)
        else:
            text = bytes(np.concatenate([corpus.train, corpus.val]))
            # Whole parts that follow each other are one text: what repeats a part repeats it.
            wanted = content if suffix in ("", ".txt") else TEXT * (len(text) // len(TEXT) + 1)
            assert text == wanted[: len(text) if data_bytes is None else data_bytes]
        assert path.read_bytes() == content
        path.unlink()
        assert list(tmp_path.iterdir()) == []

    damages = [
        mutated(pack(TEXT), st.binary(max_size=9)).map(
            lambda content, suffix=suffix: (suffix, content)
        )
        for suffix, pack in PACK.items()
    ]
    lengths = st.one_of(st.none(), st.integers(1, len(TEXT)))
    hold(examples, check, damaged=st.one_of(damages), data_bytes=lengths)


# Prompts


@inputs("prompts")
def test_a_prompt_of_any_bytes_is_continued_with_printable_text(
    examples, finished, tmp_path, monkeypatch
):
    weights, file = tmp_path / "final.pt", tmp_path / "prompt"
    weights.write_bytes(finished[1]["final.pt"])

    def check(prompt, options):
        file.write_bytes(prompt)
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", io.StringIO())
            try:
                arguments = [str(weights), "--prompt-file", str(file), "--max-length", "3"]
                assert inference.main([*arguments, *options]) == 0
            except UserError as error:
                one_line(error)
                return
        out.flush()
        text = out.buffer.getvalue().decode("utf-8")
        assert all(c.isprintable() or c in "\n\t" for c in text)

    values = st.one_of(st.floats().map(str), st.integers().map(str), st.text(max_size=4))
    names = st.sampled_from(["--temperature", "--min-p", "--top-k", "--seed", "--prompt"])
    options = st.lists(st.tuples(names, values).map("=".join), max_size=2)
    hold(examples, check, prompt=st.binary(max_size=40), options=options)
