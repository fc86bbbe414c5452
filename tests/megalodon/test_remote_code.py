"""trust_remote_code=True: programs that import nothing load what was saved."""

import json
import os
import subprocess
import sys
from unittest.mock import Mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megalodon import MegalodonConfig, MegalodonTokenizer

from .models import tiny_config, tiny_model

STRANGER = """
import sys
import types
from transformers import AutoModelForCausalLM, AutoTokenizer

saved, again, llama = sys.argv[1:]
for instead in (None, types.ModuleType("megalodon")):  # none, and the other program of this name
    sys.modules["megalodon"] = instead
    for auto, folder in ((AutoModelForCausalLM, saved), (AutoTokenizer, llama)):
        try:
            auto.from_pretrained(folder, trust_remote_code=True)
        except ImportError as error:
            print(error)
try:
    AutoModelForCausalLM.from_pretrained(saved)
except ValueError as error:
    print(error)
del sys.modules["megalodon"]  # it is installed after all
model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(saved, trust_remote_code=True)
ids = tokenizer("é", return_tensors="pt").input_ids
print(model.generate(ids, max_new_tokens=20, do_sample=False).tolist())
print(AutoTokenizer.from_pretrained(llama, trust_remote_code=True).encode("é"))
model.save_pretrained(again)
tokenizer.save_pretrained(again)
"""


def test_a_program_that_imports_nothing_loads_and_saves_or_is_told_what_to_install(tmp_path):
    model, saved, again, llama = (tiny_model(), *(tmp_path / name for name in ("a", "b", "llama")))
    model.save_pretrained(saved)
    MegalodonTokenizer().save_pretrained(saved)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=1, **sizes)).save_pretrained(
        llama
    )
    MegalodonTokenizer().save_pretrained(llama)
    assert not (llama / "modeling_megalodon.py").exists()
    assert "auto_map" not in json.loads((llama / "config.json").read_text())
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", STRANGER, saved, again, llama],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        # transformers copies the files that it runs to its cache.
        env={**os.environ, "HF_HOME": str(tmp_path / "cache")},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    *lines, asked, output, encoded = done.stdout.splitlines()
    for line in lines[:4]:
        assert "this folder needs the library megalodon of the project megalodon-enwik8" in line
        assert "pip install ." in line
    # Without the flag nothing of the folder is run: transformers asks first.
    assert "pass the argument `trust_remote_code=True`" in asked
    assert encoded == "[195, 169]"
    ids = torch.tensor([list("é".encode())])
    assert output == str(model.generate(ids, max_new_tokens=20, do_sample=False).tolist())
    # What that program saved is the same folder: no code of the library was copied into it.
    names = sorted(path.name for path in saved.iterdir())
    assert sorted(path.name for path in again.iterdir()) == names
    code = [name for name in names if name.endswith(".py")]
    assert code == ["modeling_megalodon.py", "tokenization_megalodon.py"]
    for name in [*code, "config.json"]:
        assert (again / name).read_text() == (saved / name).read_text()
        assert "class Megalodon" not in (saved / name).read_text()
    tokenizers = [json.loads((at / "tokenizer_config.json").read_text()) for at in (saved, again)]
    assert tokenizers[0]["auto_map"] == tokenizers[1]["auto_map"]


def test_a_config_that_is_pushed_alone_is_pushed_whole(tmp_path, monkeypatch):
    """transformers sends the files that are new since a moment before which ours is written."""
    push = Mock()
    monkeypatch.setattr(MegalodonConfig, "push_to_hub", push)
    tiny_config().save_pretrained(tmp_path / "name", push_to_hub=True, private=True)
    push.assert_called_once_with("name", private=True)
    assert (tmp_path / "name" / "modeling_megalodon.py").exists()
