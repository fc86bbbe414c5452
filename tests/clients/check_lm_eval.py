"""lm-evaluation-harness on an export of either model, against direct calls. Run by hand:

pip install torch==2.13.0
pip install -e . lm_eval==0.4.13 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0
python tests/clients/check_lm_eval.py
"""

import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from small import Findings, export

# None ends in a space: lm_eval counts one as part of what follows.
TEXTS = [
    "The history of the",
    "a",
    "Göttingen is a town",
    "\n".join(["Megalodon, a model of bytes, reads a text of any length in pieces."] * 3),
]
ENDINGS = [" state", "b", " — é", "\nAnd so on."]
NEW = 24

TASKS = {
    "bytes_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{endings}}"
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "bytes_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "bytes_generate": f"""
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{written}}}}"
generation_kwargs: {{until: [], max_gen_toks: {NEW}, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
}


class Direct:
    """The same questions, asked of the model one text at a time."""

    def __init__(self, folder):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        # This process has imported megalodon, to export; lm_eval's own imports nothing.
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def likelihood(self, context, continuation):
        """The log of its probability in nats, and whether it is what greedy decoding gives."""
        ids = self.torch.tensor([context + continuation])
        with self.torch.no_grad():
            scores = self.model(ids).logits[0, len(context) - 1 : -1].float().log_softmax(-1)
        targets = ids[0, len(context) :]
        greedy = bool((scores.argmax(-1) == targets).all())
        return scores.gather(1, targets[:, None]).sum().item(), greedy

    def written(self, text):
        ids = self.torch.tensor([list(text.encode())])
        mask = self.torch.ones_like(ids)
        new = self.model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        return str(self.tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def check_calls(kind, folder, findings):
    """The three kinds of request, texts of all lengths in one batch."""
    from lm_eval.models.huggingface import HFLM

    direct, lm = Direct(folder), HFLM(pretrained=str(folder), batch_size=4, device="cpu")
    pairs = [(text, ending) for text in TEXTS for ending in ENDINGS]
    expected = [direct.likelihood(list(a.encode()), list(b.encode())) for a, b in pairs]
    found = lm.loglikelihood(requests(*pairs), disable_tqdm=True)
    largest = max(abs(f[0] - e[0]) for f, e in zip(found, expected, strict=True))
    agree = largest < 1e-3 and all(f[1] == e[1] for f, e in zip(found, expected, strict=True))
    findings.row(
        agree,
        f"{kind}: HFLM loglikelihood, {len(pairs)} requests, largest difference {largest:.0e}",
    )
    expected = [direct.likelihood([0], list(text.encode()))[0] for text in TEXTS]
    found = lm.loglikelihood_rolling(requests(*((text,) for text in TEXTS)), disable_tqdm=True)
    largest = max(abs(f - e) for f, e in zip(found, expected, strict=True))
    findings.row(
        largest < 1e-3,
        f"{kind}: HFLM rolling, after byte 0, {len(TEXTS)} texts, largest difference {largest:.0e}",
    )
    options = {"until": [], "max_gen_toks": NEW, "do_sample": False}
    found = lm.generate_until(requests(*((text, options) for text in TEXTS)), disable_tqdm=True)
    findings.row(
        found == [direct.written(text) for text in TEXTS],
        f"{kind}: HFLM generate_until, {len(TEXTS)} prompts of unlike lengths, equal texts",
    )


def check_command(kind, folder, scratch, findings):
    """The command line, which imports nothing of ours, on a task from a local file."""
    direct = Direct(folder)
    documents = []
    for i, text in enumerate(TEXTS):
        scores = [direct.likelihood(list(text.encode()), list(end.encode()))[0] for end in ENDINGS]
        # The likeliest ending, but for the first text another.
        answer = (scores.index(max(scores)) + (i == 0)) % len(ENDINGS)
        written = direct.written(text)
        documents.append({"text": text, "endings": ENDINGS, "answer": answer, "written": written})
    tasks, data = scratch / f"{kind}-tasks", scratch / f"{kind}.jsonl"
    tasks.mkdir()
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, text in TASKS.items():
        source = f"task: {name}\ndataset_path: json\ntest_split: train\n"
        source += f"dataset_kwargs: {{data_files: {data}}}\n"
        (tasks / f"{name}.yaml").write_text(source + text)
    out = scratch / f"{kind}-out"
    command = [str(Path(sys.executable).with_name("lm_eval")), "--model", "hf", "--model_args"]
    command += [f"pretrained={folder},trust_remote_code=True", "--include_path", str(tasks)]
    command += ["--tasks", ",".join(TASKS), "--batch_size", "4", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--output_path", str(out)], capture_output=True, text=True, check=False
    )
    files = list(out.rglob("results*.json"))
    if done.returncode or not files:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        findings.row(False, f"{kind}: lm_eval exits with {done.returncode}: {last}")
        return
    results = json.loads(files[0].read_text())["results"]

    nats = sum(direct.likelihood([0], list(text.encode()))[0] for text in TEXTS)
    expected = {
        "bytes_choice": ("acc", 1 - 1 / len(TEXTS)),
        "bytes_rolling": (
            "bits_per_byte",
            -nats / math.log(2) / sum(len(text.encode()) for text in TEXTS),
        ),
        "bytes_generate": ("exact_match", 1.0),
    }
    for task, (metric, value) in expected.items():
        found = results[task][f"{metric},none"]
        findings.row(
            math.isclose(found, value, abs_tol=1e-4),
            f"{kind}: lm_eval --tasks {task}: {metric} {found:.4f}, directly {value:.4f}",
        )


def main():
    findings, scratch = Findings(), Path(tempfile.mkdtemp())
    for kind in ("llama", "megalodon"):
        folder = export(kind, scratch)
        check_calls(kind, folder, findings)
        check_command(kind, folder, scratch, findings)
    shutil.rmtree(scratch)
    findings.exit()


if __name__ == "__main__":
    main()
