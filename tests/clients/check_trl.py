"""trl's SFTTrainer on an export of either model, against direct calls. Run by hand:

pip install torch==2.13.0
pip install -e . trl==1.16.0 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0
python tests/clients/check_trl.py
"""

import shutil
import tempfile
from pathlib import Path

from small import ROOT, Findings, export

STEPS = 10


def texts():
    """The README's paragraphs of at most 300 bytes."""
    paragraphs = (ROOT / "README.md").read_text().split("\n\n")
    return [text for text in paragraphs if 1 < len(text.encode()) <= 300][:16]


def direct_loss(model, rows):
    """The mean over all bytes but the first of each row, asked one row at a time."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            total += model.eval()(ids, labels=ids).loss.item() * (len(row) - 1)
            count += len(row) - 1
    return total / count


def check(kind, folder, scratch, packing, findings):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"text": texts()})
    name = f"{kind}: SFTTrainer, {'packing=True' if packing else 'padded'}"
    arguments = SFTConfig(
        output_dir=str(scratch / f"{kind}-{packing}"),
        packing=packing,
        max_length=512,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=16,
        max_steps=STEPS,
        learning_rate=3e-3,
        trust_remote_code=True,
        # In float32 on the CPU, to compare with direct calls.
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    try:
        trainer = SFTTrainer(str(folder), args=arguments, train_dataset=data, eval_dataset=data)
        found = trainer.evaluate()["eval_loss"]
    except Exception as error:
        findings.row(False, f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return
    rows = [[*text.encode(), 0] for text in texts()]
    expected = direct_loss(AutoModelForCausalLM.from_pretrained(folder), rows)
    findings.row(
        abs(found - expected) < 1e-4,
        f"{name}: loss of {len(rows)} texts, each ended by byte 0: {found:.5f}, "
        f"directly {expected:.5f}",
    )
    trainer.train()
    trainer.save_model()
    after = trainer.evaluate()["eval_loss"]
    findings.row(after < found, f"{name}: after {STEPS} steps {after:.5f}")
    saved = AutoModelForCausalLM.from_pretrained(arguments.output_dir)
    AutoTokenizer.from_pretrained(arguments.output_dir)
    again = direct_loss(saved, rows)
    findings.row(abs(again - after) < 1e-4, f"{name}: what it saved has the loss {again:.5f}")


def main():
    findings, scratch = Findings(), Path(tempfile.mkdtemp())
    for kind in ("llama", "megalodon"):
        folder = export(kind, scratch)
        for packing in (False, True):
            check(kind, folder, scratch, packing, findings)
    shutil.rmtree(scratch)
    findings.exit()


if __name__ == "__main__":
    main()
