"""Training as transformers and peft do it: Trainer, checkpointing, packing, adapters."""

import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainingArguments

from megalodon import MegalodonForCausalLM

from .models import CHUNK, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("no_warnings")


def rows(count, length=2 * CHUNK + 3, masked=0.0):
    """Texts that repeat a short pattern, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 256, (count, 5), generator=generator)
    texts = patterns.repeat(1, -(-length // 5))[:, :length]
    ignored = torch.rand(texts.shape, generator=generator) < masked
    labels = texts.masked_fill(ignored, -100)
    return [{"input_ids": x, "labels": y} for x, y in zip(texts, labels, strict=True)]


def arguments(folder, **options):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    checkpointing = options.pop("checkpointing", None)
    if checkpointing is not None:  # the name has changed within transformers 5
        names = {field.name for field in dataclasses.fields(TrainingArguments)}
        kind = "activation" if "activation_checkpointing" in names else "gradient"
        settings[f"{kind}_checkpointing"] = True
        settings[f"{kind}_checkpointing_kwargs"] = {"use_reentrant": checkpointing}
    return TrainingArguments(**{**settings, **options})


def trained(model, folder, data=None, **options):
    trainer = Trainer(model, arguments(folder, **options), train_dataset=data or rows(16))
    trainer.train()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_trainer_trains_evaluates_and_predicts(tmp_path):
    data = rows(16)
    trainer = Trainer(
        tiny_model(), arguments(tmp_path, max_steps=32), train_dataset=data, eval_dataset=data
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before - 1
    prediction = trainer.predict(data[:3])
    assert prediction.predictions.shape == (3, len(data[0]["input_ids"]), 256)


def test_a_resumed_run_is_the_run_without_a_stop(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    data = rows(16)
    whole = trained(tiny_model(dropout=0.1), tmp_path, data, **options)
    model = tiny_model(dropout=0.1)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert largest_difference(dict(model.named_parameters()), whole) == 0


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    """Rows with unlike numbers of labels: a mean of the pieces' means would be something else."""
    data = rows(12, masked=0.2)
    for i, row in enumerate(data):
        row["labels"] = row["labels"].clone()
        row["labels"][: i % 4 * 4] = -100
    options = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1}
    results = [
        trained(
            tiny_model(),
            tmp_path,
            data,
            per_device_train_batch_size=4 // pieces,
            gradient_accumulation_steps=pieces,
            **options,
        )
        for pieces in (1, 4)
    ]
    # Sums of float32 in another order.
    assert largest_difference(results[0], results[1]) < 1e-6
    assert largest_difference(results[0], dict(tiny_model().named_parameters())) > 1e-2


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_through_trainer_changes_nothing(tmp_path, reentrant):
    counts, results = [], []
    for checkpointing in (None, reentrant):
        model = tiny_model(dropout=0.1, hidden_dropout=0.1)
        calls = []
        for block in model.model.layers:
            block.ffn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        results.append(trained(model, tmp_path, checkpointing=checkpointing))
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0]  # every block was computed again
    assert largest_difference(*results) == 0


def test_bfloat16_autocast_trains_float32_parameters(tmp_path):
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = trained(model, tmp_path, bf16=True)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in after.values())
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_label_smoothing_looks_at_the_next_token(tmp_path):
    model, row = tiny_model(), rows(1)[0]
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1))
    batch = {name: tensor[None] for name, tensor in row.items()}
    loss = trainer.compute_loss(model, dict(batch))
    logits = model(batch["input_ids"]).logits[0, :-1]
    expected = F.cross_entropy(logits, row["labels"][1:], label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


class TestLoss:
    def test_is_the_mean_over_the_labels_that_count(self):
        model = tiny_model()
        row = rows(2, masked=0.3)
        ids = torch.stack([r["input_ids"] for r in row])
        labels = torch.stack([r["labels"] for r in row])
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        targets = labels[:, 1:].flatten()
        mean = F.cross_entropy(logits, targets)
        torch.testing.assert_close(model(ids, labels=labels).loss, mean)
        other = labels.masked_fill(labels == -100, 999)
        torch.testing.assert_close(model(ids, labels=other, ignore_index=999).loss, mean)
        total = F.cross_entropy(logits, targets, reduction="sum")
        for items in (7, torch.tensor(7)):
            loss = model(ids, labels=labels, num_items_in_batch=items).loss
            torch.testing.assert_close(loss, total / 7)

    def test_of_a_text_in_pieces_leaves_out_the_first_token_of_each(self):
        model = tiny_model()
        ids = torch.stack([row["input_ids"] for row in rows(2)])
        mask = torch.ones_like(ids)
        logits = model(ids).logits
        cache = model(ids[:, :7], use_cache=True).cache
        loss = model(ids[:, 7:], mask, cache=cache, labels=ids[:, 7:]).loss
        expected = F.cross_entropy(logits[:, 7:-1].flatten(0, 1), ids[:, 8:].flatten())
        torch.testing.assert_close(loss, expected)

    def test_of_some_positions_only_is_refused(self):
        ids = torch.zeros(1, 4, dtype=torch.long)
        with pytest.raises(ValueError, match="logits_to_keep=0"):
            tiny_model()(ids, labels=ids, logits_to_keep=2)

    def test_needs_labels_of_the_shape_of_the_input(self):
        ids = torch.zeros(1, 4, dtype=torch.long)
        with pytest.raises(ValueError, match="labels has shape"):
            tiny_model()(ids, labels=ids[:, 1:])


def test_a_model_in_training_returns_no_state_unless_asked():
    model = MegalodonForCausalLM(tiny_config()).train()
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert model(ids).cache is None
    assert model(ids, use_cache=True).cache is not None
    assert model.eval()(ids).cache is not None
    assert MegalodonForCausalLM(tiny_config(use_cache=False)).eval()(ids).cache is None


class TestLoRA:
    LINEARS = ("wz", "wv", "wr", "wh1", "wh2", "w1", "w2", "w3")

    def lora(self, model, **options):
        from peft import LoraConfig, get_peft_model

        with warnings.catch_warnings():
            # peft asks models under a name that transformers has deprecated.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **options))

    @pytest.mark.parametrize("checkpointing", [None, True, False])
    def test_trains_the_adapter_and_nothing_else(self, tmp_path, checkpointing):
        model = self.lora(tiny_model(), target_modules="all-linear")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        after = trained(model, tmp_path, checkpointing=checkpointing)
        for name in before:
            assert torch.equal(before[name], after[name]) is ("lora_" not in name), name
        assert sum("lora_" in name for name in before) == 2 * 2 * len(self.LINEARS)

    @torch.no_grad()
    def test_is_saved_loaded_merged_and_generates(self, tmp_path):
        from peft import PeftModel

        ids = torch.stack([row["input_ids"] for row in rows(2)])
        model = self.lora(tiny_model(), target_modules="all-linear", init_lora_weights=False)
        model.eval()
        logits = model(ids).logits
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            again = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
        assert torch.equal(again(ids).logits, logits)
        output = again.generate(input_ids=ids, max_new_tokens=CHUNK, do_sample=False)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, logits, rtol=0, atol=1e-4)
        assert torch.equal(merged.generate(ids, max_new_tokens=CHUNK, do_sample=False), output)
