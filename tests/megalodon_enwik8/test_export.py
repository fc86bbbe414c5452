"""Checkpoints as folders that transformers loads."""

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
)

from megalodon import MegalodonTokenizer
from megalodon_enwik8.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from megalodon_enwik8.export import main
from megalodon_enwik8.generation import generate_bytes
from megalodon_enwik8.models import build_model, restore_model
from megalodon_enwik8.run_folder import read_metrics
from megalodon_enwik8.training import train

from .programs import refused

ROOT = Path(__file__).parents[2]


def write_checkpoint(path, config):
    path.parent.mkdir(parents=True, exist_ok=True)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_checkpoint(path, Checkpoint(config, 3, "", {}, model.state_dict(), None))
    return path


@pytest.fixture
def checkpoint(make_tiny, model_name, tmp_path):
    """A checkpoint of either model."""
    return write_checkpoint(tmp_path / "run" / "final.pt", make_tiny(model_name))


def files_of(model_name):
    files = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    files |= {"tokenization_megalodon.py", "tokenizer_config.json"}
    return files | ({"modeling_megalodon.py"} if model_name == "megalodon" else set())


def export(checkpoint, folder):
    return main([str(checkpoint), str(folder)])


def card_of(checkpoint):
    with tempfile.TemporaryDirectory() as folder:
        export(checkpoint, Path(folder))
        return Path(folder, "README.md").read_text()


@torch.no_grad()
def test_the_folder_holds_the_model_and_its_tokenizer(checkpoint, model_name, tmp_path, capsys):
    folder = tmp_path / "made" / "here"
    assert export(checkpoint, folder) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r".*here: \w+ForCausalLM after 3 steps, [\d,]+ parameters\n", out)
    assert err == ""
    assert {path.name for path in folder.iterdir()} == files_of(model_name)
    expected = restore_model(load_checkpoint(checkpoint))
    assert not expected.training
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, 256, (2, 20))
    assert type(model) is type(expected)
    assert torch.equal(model(ids).logits, expected(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is MegalodonTokenizer
    assert tokenizer.decode_bytes(tokenizer.encode(bytes(range(256)))) == bytes(range(256))
    prompt = "Göttingen "
    found = pipeline("text-generation", str(folder))(
        prompt, max_new_tokens=12, do_sample=False, return_full_text=False
    )
    new = generate_bytes(expected, prompt.encode(), length=12, seed=0, temperature=0)
    assert found[0]["generated_text"] == new.split(b"\0")[0].decode(errors="replace")


def test_byte_0_ends_what_an_export_writes_and_what_a_checkpoint_writes_it_does_not(
    checkpoint, tmp_path
):
    export(checkpoint, tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    for settings in (model.config, model.generation_config):
        assert settings.eos_token_id == settings.pad_token_id == 0
    ids = torch.tensor([[97, 98]])
    options = {"max_new_tokens": 5, "do_sample": False, "sequence_bias": {(0,): 1e6}}
    options["attention_mask"] = torch.ones_like(ids)
    assert model.generate(ids, **options).tolist() == [[97, 98, 0]]
    before = restore_model(load_checkpoint(checkpoint))
    assert before.generate(ids, **options).tolist() == [[97, 98, 0, 0, 0, 0, 0]]


def test_an_export_pads_and_trains_with_nothing_set_by_hand(checkpoint, tmp_path, caplog):
    export(checkpoint, tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    prompts = ["a", "Once upon a time", "the sea"]
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 9, "do_sample": False}
    together = generate(prompts, batch_size=3, **options)
    assert together == [generate(prompt, **options) for prompt in prompts]

    caplog.clear()  # earlier versions of transformers warn of their own pipeline
    rows = [tokenizer(text) for text in prompts]
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(tmp_path / "trained"),
            per_device_eval_batch_size=3,
            per_device_train_batch_size=3,
            max_steps=9,
            learning_rate=3e-3,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        train_dataset=rows,
        eval_dataset=rows,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1
    trainer.save_model()
    assert files_of(str(model.config.model_type)) - {"README.md"} <= {
        path.name for path in (tmp_path / "trained").iterdir()
    }
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_tour_of_clients_runs_as_printed(checkpoint, tmp_path, monkeypatch):
    tour = (ROOT / "docs" / "clients.md").read_text()
    blocks = dict(re.findall(r"## ([^\n]+)\n\n```(?:python|sh)\n(.*?)```", tour, re.S))
    assert len(blocks) == 5
    assert all(block.count("\n") <= 10 for block in blocks.values())
    export(checkpoint, tmp_path / "exported")
    (tmp_path / "texts.txt").write_text("the state of a text\nis read once\nand kept\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.path", [*sys.path])
    for client in ("Trainer", "peft", "torch.compile and torch.export"):
        exec(blocks[client], {})


class TestModelCard:
    def test_states_what_the_run_measured(self, make_tiny, tmp_path):
        config = make_tiny("megalodon", full_validation=True)
        assert train(config) == 0
        run = Path(config.run_dir)
        by_step = {row["step"]: row for row in read_metrics(run / "metrics.jsonl")}
        for name, step in (("final.pt", 6), ("checkpoint_00000004.pt", 4)):
            card = card_of(run / name)
            row = by_step[step]
            assert f"in windows of 24 bytes: {row['val_bpc']:.4f} on some windows" in card
            whole = f"{row.get('full_val_bpc', 0):.4f} on all of the validation split"
            assert (whole in card) is (step == 6)
            assert f"`words.txt`, a file: {step} steps, 4 sequences of 24 bytes" in card
            assert load_checkpoint(run / name).corpus_sha256 in card
            assert "**Licence of the text**: not known" in card
            assert str(tmp_path) not in card

    def test_names_the_text_and_its_licence(self, make_tiny, model_name, tmp_path):
        texts = {"sample": "GFDL", "data/enwik8.gz": "GFDL", "code": "Apache-2.0"}
        for data_path, licence in texts.items():
            path = write_checkpoint(tmp_path / "one.pt", make_tiny(model_name, data_path=data_path))
            card = card_of(path)
            assert re.search(rf"\*\*Licence of the text\*\*: .*{licence}", card)
            front = yaml.safe_load(card.split("---")[1])
            assert front["tags"] == [model_name, "byte-level"]

    def test_invents_no_loss(self, make_tiny, tmp_path):
        config = make_tiny("megalodon")
        assert train(config) == 0
        run, moved = Path(config.run_dir), tmp_path / "moved" / "final.pt"
        moved.parent.mkdir()
        moved.write_bytes((run / "final.pt").read_bytes())

        assert "not known, since" not in card_of(run / "final.pt")
        assert "not known, since" in card_of(moved)
        # Beside the files of another run.
        moved.with_name("metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
        other = make_tiny("megalodon", seed=8).to_yaml()
        moved.with_name("config.yaml").write_text(other)
        assert "not known, since" in card_of(moved)


def test_a_vocabulary_wider_than_the_bytes_generates_bytes_only(make_tiny, model_name, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "wide.pt", make_tiny(model_name, num_tokens=1000))
    export(checkpoint, tmp_path / "wide")
    output = pipeline("text-generation", str(tmp_path / "wide"))(
        "a", max_new_tokens=30, return_tensors=True, top_k=0
    )
    assert max(output[0]["generated_token_ids"]) < 256


@pytest.mark.parametrize("model_name", ["megalodon"], indirect=True)
def test_mistakes_are_one_line_and_code_2(checkpoint, tmp_path, capfd):
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(checkpoint.read_bytes()[:-100])
    target = tmp_path / "target"
    cases = [
        ([], "required: checkpoint, DIR"),
        ([checkpoint], "required: DIR"),
        ([checkpoint, target, "--force"], "unrecognized arguments: --force"),
        ([tmp_path / "none.pt", target], "no such checkpoint"),
        ([tmp_path / "run", target], "no such checkpoint"),
        ([truncated, target], "truncated, damaged, of another version or not a ch"),
        ([checkpoint, truncated], "Not a directory: mend that"),
        ([checkpoint, truncated / "below"], "Not a directory: mend that"),
        ([checkpoint, truncated.parent / "run"], "holds final.pt: name a new or an empty folder"),
    ]
    for arguments, message in cases:
        assert message in refused(capfd, main, *arguments)
    assert not target.exists()


@pytest.mark.parametrize("failing", ["save_pretrained", "replace"])
@pytest.mark.parametrize("model_name", ["megalodon"], indirect=True)
def test_a_full_disk_leaves_nothing(checkpoint, tmp_path, monkeypatch, failing):
    folder = tmp_path / "exported"

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    owner = "transformers.PreTrainedModel" if failing == "save_pretrained" else "os"
    monkeypatch.setattr(f"{owner}.{failing}", full)
    with pytest.raises(OSError, match="No space left"):
        export(checkpoint, folder)
    assert list(folder.iterdir()) == []


def test_the_example_in_the_readme_runs_as_printed(make_tiny, tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    section = readme.split("## Megalodon as a Hugging Face model\n")[1].split("\n## ")[0]
    command = re.findall(r"```sh\n(.*?)```", section, re.S)[0].strip()
    code = re.findall(r"```python\n(.*?)```", section, re.S)[0]
    assert code.count("\n") <= 5
    monkeypatch.chdir(tmp_path)
    start, arguments = "python -m megalodon_enwik8.export ", shlex.split(command)[3:]
    assert command.startswith(start)
    run = str(Path(arguments[0]).parent)
    # After so many steps byte 0, which would end the text, is too unlikely for min_p.
    options = {"num_batches": 20, "learning_rate": 1e-2, "save_every": 0, "validate_every": 0}
    assert train(make_tiny("megalodon", run_dir=run, **options)) == 0
    assert main(arguments) == 0
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().startswith("The history of ")
    assert len(done.stdout.decode()) > len("The history of ") + 30
    # Progress, and what the pipeline of transformers 5.17 says of its own call of generate.
    theirs = ("Loading weights", "generation-related arguments", "Both `max_new_tokens` (")
    lines = done.stderr.decode().splitlines()
    assert not any(line and not any(words in line for words in theirs) for line in lines)
