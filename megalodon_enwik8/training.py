"""The training step, which accumulates gradients, and the loop of a run: one for all models."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import platform
import secrets
import shlex
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from pydantic import TypeAdapter
from tqdm import tqdm
from transformers import PreTrainedModel

from megalodon_enwik8.checkpoint import Checkpoint
from megalodon_enwik8.config import FREE_KEYS, ExperimentConfig, bits_per_byte
from megalodon_enwik8.data import Corpus, load_corpus, training_batch, validation_starts
from megalodon_enwik8.device import (
    autocast,
    choose_device,
    device_name,
    has_bfloat16,
    keep_freed_memory,
    peak_memory_bytes,
    processor_name,
)
from megalodon_enwik8.distributed import World, join, spread_like, whole
from megalodon_enwik8.evaluation import score_windows
from megalodon_enwik8.generation import PrintableDecoder, generate_bytes
from megalodon_enwik8.models import (
    build_model,
    byte_losses,
    compile_layers,
    count_parameters,
    load_weights,
)
from megalodon_enwik8.run_folder import NEWEST, Row, RunFolder, check_tracker
from megalodon_enwik8.safety import Stopped, StopRequest, UserError

STOPPED = "stopped, the earlier checkpoints are good; start again with a lower learning_rate"


def train(
    config: ExperimentConfig, *, resume: str | Path | None = None, overwrite: bool = False
) -> int:
    """Train as configured, in config.run_dir.

    resume: a checkpoint's path, or run_folder.NEWEST; overwrite: start over in a folder that holds
    a run, which is renamed. Returns the exit code: 0, or 128 and the number of the signal that
    asked for an early, saved end (130 for Ctrl-C). Raises UserError for what the user can mend.
    """
    keep_freed_memory()
    device = choose_device()
    check_tracker(config.tracker)
    with join(device, config.chunk_parallel) as world, ExitStack() as stack:
        config = world.from_main(config)
        world.check(config)
        # torchrun counts on each machine how often it has started the run anew.
        if world.largest(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))):
            resume, overwrite = NEWEST, False
        folder = RunFolder(config.run_dir)
        if world.is_main:
            stack.enter_context(folder.held(may_hold_a_run=overwrite or resume is not None))
        world.wait()
        return _train(config, folder, world, resume)


def _train(
    config: ExperimentConfig, folder: RunFolder, world: World, resume: str | Path | None
) -> int:
    found = None if resume is None else folder.find_checkpoint(resume)
    chosen: dict[str, Any] = {}
    if config.seed < 0:
        chosen["seed"] = found.config.seed if found else secrets.randbelow(2**31)
        print(f"seed={chosen['seed']}: drawn, since the config leaves it open", flush=True)
    if config.use_autocast == "auto":
        here = has_bfloat16(world.device)
        chosen["use_autocast"] = found.config.use_autocast if found else here
    config = world.from_main(config.model_copy(update=chosen))
    if found is not None:
        check_resumable(found, config)
    corpus = load_corpus(config.data_path, config.data_bytes)
    model = build_model(config, world.device)
    if found is not None:
        load_weights(model, found)
    compiled = compile_layers(model, config, world.size)
    trainer = Trainer(config, folder, corpus, model, world)
    if found is not None:
        trainer.restore(found)
    environment = {
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.sha256,
            "train_bytes": len(corpus.train),
            "val_bytes": len(corpus.val),
        },
        "parameters": count_parameters(model),
        "sessions": [describe_session(compiled, trainer.step, world)],
    }
    said = {"run_dir": config.run_dir, "model": config.model, **environment}
    print(yaml.safe_dump(said, sort_keys=False, allow_unicode=True), flush=True)
    if config.use_autocast and not has_bfloat16(world.device):
        print("bfloat16 is slow on this processor: use_autocast=auto is many times faster")
    world.wait()  # all have read what begin() may rename
    if world.is_main:
        folder.begin(config, environment, found)
    return trainer.run()


def make_optimizer(model: PreTrainedModel, config: ExperimentConfig) -> torch.optim.Optimizer:
    """Adam with L2 weight decay on every parameter, as the protocol has it; or AdamW (Loshchilov
    and Hutter 2019, arXiv 1711.05101), which decays the matrices and the embedding alone."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (0.9, config.beta2),
        "weight_decay": config.weight_decay,
        "fused": True,
    }
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), **settings)
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    matrices = {module.weight for module in model.modules() if isinstance(module, kinds)}
    decayed = [p for p in model.parameters() if p in matrices]
    others = [p for p in model.parameters() if p not in matrices]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, **settings)


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: torch.Tensor,
    config: ExperimentConfig,
    world: World | None = None,
) -> tuple[float, float]:
    """One step on `batch` (sequences, L + 1) int64, `config.batch_size` sequences at a time: all of
    the step's, or this process's share in a world of several.

    Each micro-batch runs its own backward on its share of the mean, so the gradient is that of
    the whole batch at the memory of one micro-batch. Returns the mean loss in nats per byte and
    the norm of the gradient before clipping; if either is not finite, the weights stay as they
    are.
    """
    device = batch.device
    world = world or World(device)
    loss = torch.zeros((), device=device)
    micro_batches = batch.split(config.batch_size)
    if device.type == "cuda" and config.compile in ("auto", "graphs"):
        torch.compiler.cudagraph_mark_step_begin()  # nothing of the last step is in use
    for number, micro_batch in enumerate(micro_batches, 1):
        with world.backward_of(model, last=number == len(micro_batches)):
            with autocast(device, config.use_autocast):
                share = byte_losses(model, micro_batch).sum() / batch[:, 1:].numel()
            share.backward()
        loss += share.detach()
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip_norm))
    loss = world.sum(loss) / world.size
    mean_loss, grad_norm = torch.stack([loss, norm]).tolist()  # the step's only wait for the device
    if math.isfinite(mean_loss) and math.isfinite(grad_norm):
        optimizer.step()
    optimizer.zero_grad()
    return mean_loss, grad_norm


@dataclass
class Progress:
    """What the loop counts besides its steps; part of every checkpoint."""

    seconds: float = 0.0  # in training steps alone
    skipped_steps: int = 0
    best_val_loss: float = math.inf


@dataclass
class Trainer:
    """A run in progress: its model, optimizer, folder, and how far it is."""

    config: ExperimentConfig
    folder: RunFolder
    corpus: Corpus
    model: PreTrainedModel
    world: World

    def __post_init__(self) -> None:
        config = self.config
        self.learner = self.world.distribute(self.model, config)
        self.optimizer = make_optimizer(self.model, config)
        self.validated = validation_starts(
            self.corpus.val,
            count=config.val_batches,
            seq_len=config.seq_len,
            midway=config.val_windows == "search",
        )
        self.step = 0  # steps done
        self.progress = Progress()
        self.stop_request = StopRequest()

    def check(self) -> None:
        """Raise Stopped if a signal has come, to any process: all ask at the same places."""
        if number := self.world.largest(self.stop_request()):
            raise Stopped(number)

    def run(self) -> int:
        """The steps that remain, then the final validation. Returns the exit code."""
        config = self.config
        seen = None if self.world.is_main else True
        bar = tqdm(total=config.num_batches, initial=self.step, unit="step", disable=seen)
        self.model.train()
        with bar, self.stop_request:
            try:
                while self.step < config.num_batches:
                    row: Row = {"step": self.step}
                    if _due(self.step, config.validate_every):
                        row |= self.validate()
                    if self.step > 0 and _due(self.step, config.generate_every):
                        row |= self.sample()
                    self.check()
                    row |= self.train_one_step()
                    self.log(row)
                    if _due(self.step, config.save_every) or self.step == config.num_batches:
                        self.save()
                    self.check()
                    bar.set_postfix(bpc=row["train_bpc"], refresh=False)
                    bar.update()
                self.finish()
                return 0
            except Stopped as stopped:  # the resumed run does what this one was about to do
                if self.step < config.num_batches:
                    self.save()
                code = 128 + stopped.signal_number
        path = shlex.quote(str(self.folder.file("config.yaml")))
        print(
            f"stopped after {self.step} steps, all saved; go on with: "
            f"python train.py --config {path} --resume",
            flush=True,
        )
        return code

    def train_one_step(self) -> Row:
        """Draw the step's batch, train on it, and return what metrics.jsonl says about it."""
        config, step = self.config, self.step
        began = time.perf_counter()
        # The first process draws what one alone would; the others must not draw the same.
        purpose = f"dropout {self.world.rank}" if self.world.rank else "dropout"
        torch.manual_seed(derive_seed(config.seed, step, purpose))
        batch = training_batch(
            self.corpus.train,
            seed=config.seed,
            step=step,
            sequences=self.world.sequences(config.sequences_per_step),
            seq_len=config.seq_len,
        )
        batch = self.world.part(batch).to(self.world.device)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        with self.world.sharing_time(self.model):
            loss, grad_norm = train_step(self.learner, self.optimizer, batch, config, self.world)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if not finite and config.on_nonfinite == "stop":
            raise UserError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}: {STOPPED}, or resume with "
                "on_nonfinite=skip"
            )
        seconds = time.perf_counter() - began
        self.step += 1
        self.progress.skipped_steps += not finite
        self.progress.seconds += seconds
        return {
            # JSON has no nan: a skipped step has neither loss nor norm.
            "train_loss": loss if finite else None,
            "train_bpc": bits_per_byte(loss) if finite else None,
            "grad_norm": grad_norm if finite else None,
            "learning_rate": config.learning_rate_at(step),
            "tokens_per_second": config.tokens_per_step / seconds,
            **self.counts(),
        }

    def validate(self) -> Row:
        """The loss on the fixed windows; keeps the weights if they are the best so far."""
        loss = self.score(self.validated)
        if not math.isfinite(loss):
            raise UserError(f"step {self.step}: validation loss {loss}: {STOPPED}")
        # Without the file the best loss is another folder's, whose checkpoint was resumed here.
        best = self.progress.best_val_loss if self.folder.file("best.pt").exists() else math.inf
        if self.world.largest(self.config.keep_best and loss < best):
            self.progress.best_val_loss = loss
            self.save("best.pt", with_optimizer=False)
        row = {"val_loss": loss, "val_bpc": bits_per_byte(loss)}
        self.say(
            f"step {self.step}: validation loss {loss:.4f}, {row['val_bpc']:.4f} BPC "
            f"({self.progress.seconds:.0f} s of training)"
        )
        return row

    def score(self, starts: list[int] | None = None) -> float:
        """The loss on windows of the validation split, which begin there or stand side by side."""
        config = self.config
        return score_windows(
            self.model,
            self.corpus.val,
            context=config.seq_len,
            stride=config.seq_len,
            starts=starts,
            use_autocast=config.use_autocast,
            check=self.check,
            world=self.world,
        ).loss

    def sample(self) -> Row:
        """The validation split's first bytes as a prompt, and what the model makes of them."""
        config = self.config
        prompt = self.corpus.val[: config.generate_prompt_len].tobytes()
        made = generate_bytes(
            self.model,
            prompt,
            length=config.generate_length,
            seed=derive_seed(config.seed, self.step, "sample"),
            temperature=config.temperature,
            min_p=config.min_p,
            check=self.check,
        )
        text = PrintableDecoder().decode(prompt + made, final=True)
        self.say(f"step {self.step}, a sample:\n{text}\n")
        return {"sample": text}

    def finish(self) -> None:
        """Save final.pt, validate on the windows and the whole split, and show a sample."""
        self.save("final.pt", with_optimizer=False)
        row: Row = {"step": self.step, **self.validate()}
        if self.config.full_validation:
            loss = self.score()
            row |= {"full_val_loss": loss, "full_val_bpc": bits_per_byte(loss)}
            self.say(f"whole validation split: {loss:.4f}, {row['full_val_bpc']:.4f} BPC")
        if self.config.generate_every:
            row |= self.sample()
        self.check()
        self.log({**row, **self.counts()})
        self.say(f"final weights: {self.folder.file('final.pt')}")

    def counts(self) -> Row:
        return {
            "skipped_steps": self.progress.skipped_steps,
            "tokens": self.step * self.config.tokens_per_step,
            "seconds": self.progress.seconds,
            "peak_memory_bytes": peak_memory_bytes(self.world.device),
        }

    def log(self, row: Row) -> None:
        if self.world.is_main:
            self.folder.log(row)

    def say(self, text: str) -> None:
        """Print above the bar, at once: a log file may be all that is left of a killed run."""
        try:
            tqdm.write(text)
            sys.stdout.flush()
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):  # nobody reads: heard at a check()
                raise

    def save(self, name: str | None = None, *, with_optimizer: bool = True) -> None:
        """A checkpoint of this step, named after it if not otherwise."""
        checkpoint = Checkpoint(
            config=self.config,
            step=self.step,
            corpus_sha256=self.corpus.sha256,
            progress=asdict(self.progress),
            model_state=whole(self.model.state_dict()),
            optimizer_state=whole(self.optimizer.state_dict()) if with_optimizer else None,
        )
        if self.world.is_main:
            name = name or f"checkpoint_{self.step:08d}.pt"
            self.folder.save(name, checkpoint, self.config.keep_last)
        self.world.wait_for_main()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where `checkpoint` was made; the model has its weights."""
        if checkpoint.corpus_sha256 != self.corpus.sha256:
            raise UserError(
                f"{checkpoint.path}: trained on another text than data_path="
                f"{self.config.data_path}, by its SHA-256"
            )
        try:
            state = checkpoint.optimizer_state or {}
            # The moments of a saved optimizer; its settings are those of this run's config.
            groups = self.optimizer.state_dict()["param_groups"]
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            moments = {i: spread_like(parameters[i], each) for i, each in state["state"].items()}
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
            for parameter, moments in self.optimizer.state.items():
                shapes = [moments[name].shape for name in ("exp_avg", "exp_avg_sq")]
                if shapes != [parameter.shape] * 2 or not float(moments["step"]) > 0:
                    raise ValueError("moments of other weights")
            self.progress = TypeAdapter(Progress).validate_python(checkpoint.progress)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{checkpoint.path}: its optimizer or progress is damaged: {error}"
            ) from error
        self.step = checkpoint.step


def check_resumable(checkpoint: Checkpoint, config: ExperimentConfig) -> None:
    """Raise UserError unless going on from `checkpoint` with `config` continues the same run."""
    path, before = checkpoint.path, checkpoint.config
    if checkpoint.optimizer_state is None:
        raise UserError(
            f"{path}: holds weights only; resume from a checkpoint_*.pt of the same folder"
        )
    # A cosine falls to its end at num_batches.
    free = FREE_KEYS if config.schedule == "cosine" else FREE_KEYS | {"num_batches"}
    then, now = (
        {**each.used(), "batch_size x grad_accum_every": each.sequences_per_step}
        for each in (before, config)
    )
    changes = [
        f"{key}={now.get(key)} (was {then.get(key)})"
        for key in {**then, **now}
        if key not in free and then.get(key) != now.get(key)
    ]
    if changes:
        raise UserError(
            f"{path}: the run to resume has another config: {', '.join(changes)}; set it back"
        )
    if checkpoint.step > config.num_batches:
        raise UserError(
            f"num_batches={config.num_batches}: {path} is at step {checkpoint.step} already; "
            f"raise num_batches"
        )


def derive_seed(seed: int, step: int, purpose: str) -> int:
    """A 63-bit seed that is a pure function of its arguments, for torch.manual_seed.

    Seeding anew at each step makes dropout and sampling depend on nothing that happened
    before, so that a resumed run needs no stored generator state to be exact.
    """
    digest = hashlib.blake2b(f"{seed} {step} {purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def describe_session(compiled: str, step: int, world: World) -> dict[str, Any]:
    """What may differ each time a run is resumed, for environment.json."""
    return {
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "from_step": step,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "device": device_name(world.device),
        "threads": torch.get_num_threads(),
        "compile": compiled,
        "processes": world.size,
    }


def _commit() -> str | None:
    """The commit of this source tree, with `+` when files differ from it; None outside git."""
    file = Path(__file__).resolve()
    git = ["git", "-C", str(file.parent)]
    ours = [*git, "ls-files", "--error-unmatch", file.name]  # not a repository of something else
    describe = [*git, "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        for command in (ours, describe):
            done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
