"""What the library leans on in torch and transformers, and the versions that it was tested with."""

import ast
import inspect
import pkgutil
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import megalodon
from megalodon import MegalodonCache, versions
from megalodon.compat import CACHE_NAME

from .models import tiny_model

# Every private name of another package that the library overrides or reads, with the reason. A
# change that leans on one more fails here: look for a public way first.
PRIVATE_NAMES = {
    # Class attributes by which a model tells transformers about itself; it has no public ones.
    "_init_weights": "initialisation, also of what a file lacks",
    "_keep_in_fp32_modules_strict": "norms, CEMA and queries stay float32 when loaded in bfloat16",
    "_no_split_modules": "device_map keeps a block together",
    "_skip_keys_device_placement": "device_map leaves the cache where it is",
    "_supports_sdpa": "attn_implementation='sdpa' is served, and the default",
    "_tied_weights_keys": "the output matrix is the embedding",
    # The three functions that transformers asks of a tokenizer in Python.
    "_convert_id_to_token": "see above",
    "_convert_token_to_id": "see above",
    "_tokenize": "see above",
    # No public way.
    "_apply": "nn.Module.to(bfloat16) comes by here; norms, CEMA and queries stay float32",
    "_attn_implementation": "what the config's attn_implementation came out as",
    # A list of names, public by its own name, in a file that no documentation mentions.
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "see compat.make_known_as_causal_lm",
}


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def overridden_names():
    """Private names that a class of the library has in common with a foreign class above it."""
    found = set()
    for info in pkgutil.walk_packages(megalodon.__path__, "megalodon."):
        for member in vars(import_module(info.name)).values():
            if not inspect.isclass(member) or not member.__module__.startswith("megalodon"):
                continue
            foreign = [c for c in member.__mro__ if not c.__module__.startswith("megalodon")]
            found |= {
                name
                for name in vars(member)
                if is_private(name) and any(name in vars(above) for above in foreign)
            }
    return found - {
        "_abc_impl",
        "_backward_cls",
        "_is_protocol",
    }  # made for every such class, not leaned on


def read_names():
    """Private attributes that the library reads and none of its files defines."""
    read, own = set(), set()
    for path in Path(megalodon.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                (own if isinstance(node.ctx, ast.Store) else read).add(node.attr)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                read |= {alias.name for alias in node.names if alias.name.endswith("_NAMES")}
    private = {name for name in read if is_private(name) or name.endswith("_NAMES")}
    return private - own - {"_replace"}  # NamedTuple's _replace is public, says Python


def test_no_other_private_names_are_leaned_on():
    assert overridden_names() | read_names() == set(PRIVATE_NAMES)


def test_the_name_of_the_cache_is_that_of_transformers_own_models():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=1, **sizes))
    ids = torch.zeros(1, 2, dtype=torch.int64)
    assert isinstance(llama(ids, use_cache=True)[CACHE_NAME], DynamicCache)


@pytest.mark.usefixtures("no_warnings")
def test_both_names_of_the_cache_are_taken_and_the_new_one_can_be_read():
    model, ids = tiny_model(), torch.arange(20)[None]
    whole = model(ids).logits[:, 10:]
    for part, logits in ((model.model, None), (model, whole)):
        for name in ("cache", "past_key_values"):
            cache = MegalodonCache(model.config)
            assert part(ids[:, :10], **{name: cache}).cache is cache
            output = part(ids[:, 10:], **{name: cache})
            assert output[CACHE_NAME] is output.cache is cache
            if logits is not None:
                torch.testing.assert_close(output.logits, logits, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match="two names of one thing"):
            part(ids, cache=MegalodonCache(model.config), past_key_values=cache)


@pytest.mark.usefixtures("no_warnings")
def test_generate_takes_both_names_of_the_cache():
    model, ids = tiny_model(), torch.arange(20)[None]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    for name in ("cache", "past_key_values"):
        cache = model(ids[:, :-1], use_cache=True).cache
        found = model.generate(ids, max_new_tokens=4, do_sample=False, **{name: cache})
        assert torch.equal(found, expected)


def test_the_old_name_of_the_cache_can_be_read_too():
    output = tiny_model()(torch.arange(3)[None], use_cache=True)
    assert output.past_key_values is output.cache


class TestVersions:
    def test_installed_ones_are_inside_the_ranges_or_one_line_says_so(self, monkeypatch):
        ranges = ["torch<99,>=1", "transformers<5.0,>=4.0", "numpy<0.1", 'peft>9; extra == "x"']
        monkeypatch.setattr(versions, "requires", lambda name: ranges)
        with pytest.warns(UserWarning, match="megalodon was tested with") as caught:
            versions.warn_of_untested_versions()
        (message,) = (str(warning.message) for warning in caught)
        assert message.startswith(f"transformers {sys.modules['transformers'].__version__} is")
        assert 'pip install "transformers<5.0,>=4.0"' in message
        assert "\n" not in message

    def test_files_that_were_copied_are_not_looked_at(self, monkeypatch):
        monkeypatch.setattr(versions, "DISTRIBUTION", "no-such-distribution")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            versions.warn_of_untested_versions()
