"""trust_remote_code=True: programs that import nothing load what was saved."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megalodon import MegalodonConfig, MegalodonTokenizer

from .models import tiny_config, tiny_model

STRANGER = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

saved, again = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(saved, trust_remote_code=True)
ids = tokenizer("é", return_tensors="pt").input_ids
print(model.generate(ids, max_new_tokens=20, do_sample=False).tolist())
model.save_pretrained(again)
tokenizer.save_pretrained(again)
"""

WITHOUT_THE_LIBRARY = """
import sys
import types
from transformers import AutoModelForCausalLM, AutoTokenizer

megalodon, llama = sys.argv[1:]
for instead in (None, types.ModuleType("megalodon")):  # none, and the other program of this name
    sys.modules["megalodon"] = instead
    for auto, folder in ((AutoModelForCausalLM, megalodon), (AutoTokenizer, llama)):
        try:
            auto.from_pretrained(folder, trust_remote_code=True)
        except ImportError as error:
            print(error)
try:
    AutoModelForCausalLM.from_pretrained(megalodon)
except ValueError as error:
    print(error)
del sys.modules["megalodon"]  # it is installed after all
print(AutoTokenizer.from_pretrained(llama, trust_remote_code=True).encode("é"))
"""


def run(code: str, *folders: Path) -> list[str]:
    """The lines that a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *folders],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        # transformers copies the files that it runs to its cache.
        env={**os.environ, "HF_HOME": str(folders[0].with_name("cache"))},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_program_that_imports_nothing_loads_and_saves(tmp_path: Path) -> None:
    model, saved, again = tiny_model(), tmp_path / "saved", tmp_path / "again"
    model.save_pretrained(saved)
    MegalodonTokenizer().save_pretrained(saved)
    (output,) = run(STRANGER, saved, again)
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


def test_a_config_that_is_pushed_alone_is_pushed_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers sends the files that are new since a moment before which ours is written."""
    push = Mock()
    monkeypatch.setattr(MegalodonConfig, "push_to_hub", push)
    tiny_config().save_pretrained(tmp_path / "name", push_to_hub=True, private=True)
    push.assert_called_once_with("name", private=True)
    assert (tmp_path / "name" / "modeling_megalodon.py").exists()


def test_without_the_library_one_line_says_what_to_install(tmp_path: Path) -> None:
    megalodon, llama = tmp_path / "megalodon", tmp_path / "llama"
    tiny_model().save_pretrained(megalodon)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=1, **sizes)).save_pretrained(
        llama
    )
    MegalodonTokenizer().save_pretrained(llama)
    assert not (llama / "modeling_megalodon.py").exists()
    assert "auto_map" not in json.loads((llama / "config.json").read_text())
    missing, others = (lines := run(WITHOUT_THE_LIBRARY, megalodon, llama))[:4], lines[4:]
    for line in missing:
        assert "this folder needs the library megalodon of the project megalodon-enwik8" in line
        assert "pip install ." in line
    # Without the flag nothing of the folder is run: transformers asks first.
    assert "pass the argument `trust_remote_code=True`" in others[-2]
    assert others[-1] == "[195, 169]"
