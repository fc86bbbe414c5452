"""The training loop: one for all models."""

from __future__ import annotations

import math
import secrets
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from megalodon_enwik8.carried_state import CarriedState
from megalodon_enwik8.checkpoint import Checkpoint
from megalodon_enwik8.config import ExperimentConfig
from megalodon_enwik8.data import (
    Corpus,
    check_length,
    load_corpus,
    stream_batch,
    training_batch,
    validation_windows,
)
from megalodon_enwik8.description import environment, session, summarize
from megalodon_enwik8.errors import UserError
from megalodon_enwik8.evaluation import evaluate, full_validation
from megalodon_enwik8.generation import PrintableDecoder, generate_bytes
from megalodon_enwik8.interrupt import StopRequest
from megalodon_enwik8.models import build_model, compile_layers, load_weights, summed_loss
from megalodon_enwik8.run_folder import NEWEST, RunFolder, open_run
from megalodon_enwik8.utils import (
    autocast,
    bits_per_byte,
    choose_device,
    derive_seed,
    keep_freed_memory,
    peak_memory_bytes,
)

if TYPE_CHECKING:
    from megalodon import MegalodonCache

# A resumed run may differ in these keys from the run that it continues: they leave the course
# of the weights alone. The corpus is compared by its checksum, wherever it lies, and the batch
# by its size, however it is split.
FREE_ON_RESUME = frozenset(
    {
        "run_dir", "data_path", "data_bytes", "num_batches", "batch_size", "grad_accum_every",
        "compile", "gradient_checkpointing", "on_nonfinite", "validate_every", "full_validation",
        "save_every", "keep_last", "keep_best", "generate_every", "generate_prompt_len",
        "generate_length", "temperature", "min_p",
    }
)  # fmt: skip


@dataclass
class Progress:
    """What the loop counts besides its steps; part of every checkpoint."""

    seconds: float = 0.0  # in training steps alone
    skipped_steps: int = 0
    best_val_loss: float = math.inf


def train(
    config: ExperimentConfig, *, resume: str | Path | None = None, overwrite: bool = False
) -> int:
    """Train as configured, in config.run_dir.

    resume: a checkpoint's path, or run_folder.NEWEST; overwrite: replace a run that the folder
    holds. Returns the exit code: 0, or 128 and the number of the signal that asked for an
    early, saved end (130 for Ctrl-C). Raises UserError for what the user can mend.
    """
    keep_freed_memory()
    device = choose_device()
    goes_on_here = resume is not None and (
        resume == NEWEST or Path(resume).parent.resolve() == Path(config.run_dir).resolve()
    )
    with open_run(config.run_dir, may_hold_a_run=overwrite or goes_on_here) as folder:
        found = folder.find_checkpoint(resume) if resume is not None else None
        if config.seed < 0:
            seed = secrets.randbelow(2**31) if found is None else found[0].experiment(found[1]).seed
            config = config.model_copy(update={"seed": seed})
            print(f"seed={seed}: drawn, since the config leaves it open", flush=True)
        if found is not None:
            _check_resumable(*found, config)
        corpus = load_corpus(config.data_path, config.data_bytes)
        check_length(corpus, config.seq_len)
        if config.carry_state:
            _stream_batch(corpus, config, step=0)  # its errors, before anything is written
        model = build_model(config)
        model.to(device)  # type: ignore[arg-type]
        optimizer = make_optimizer(model, config)
        trainer = Trainer(config, folder, corpus, model, optimizer)
        if found is not None:
            trainer.restore(*found)
        elif resume is not None:
            print(f"{config.run_dir} has no checkpoint yet: starting from step 0", flush=True)
        compiled = compile_layers(model, config, config.num_batches)
        print(summarize(config, model, corpus, device, compiled), flush=True)
        folder.begin(
            config,
            environment(model, corpus),
            session(device, compiled, trainer.step),
            resumed=None if found is None else found[1],
            step=trainer.step,
        )
        return trainer.run()


def make_optimizer(model: PreTrainedModel, config: ExperimentConfig) -> torch.optim.Optimizer:
    """Adam with L2 weight decay on every parameter, as the protocol has it; or AdamW (Loshchilov
    and Hutter 2019, arXiv 1711.05101), which decays the matrices and the embedding alone."""
    parameters = list(model.parameters())
    rate, betas = config.learning_rate, (0.9, config.beta2)
    if config.optimizer == "adam":
        return torch.optim.Adam(
            parameters, lr=rate, betas=betas, weight_decay=config.weight_decay, fused=True
        )
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, kinds)}
    groups = [
        {
            "params": [p for p in parameters if (id(p) in matrices) == decayed],
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)


def train_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: torch.Tensor,
    config: ExperimentConfig,
    states: Sequence[MegalodonCache] | None = None,
) -> tuple[float, float]:
    """One step on `batch` (sequences, L + 1) int64, `config.batch_size` sequences at a time.

    states: what came before the sequences, one truncated cache for each micro-batch; they are
    brought up to date.

    Each micro-batch runs its own backward on its share of the mean, so the gradient is that of
    the whole batch at the memory of one micro-batch. Returns the mean loss in nats per byte and
    the norm of the gradient before clipping; if either is not finite, the weights stay as they
    are.
    """
    device = batch.device
    tokens = batch[:, 1:].numel()
    loss = torch.zeros((), device=device)
    micro_batches = batch.split(config.batch_size)
    for i, rows in enumerate(micro_batches):
        state = None if states is None else states[i]
        with autocast(device, config.use_autocast):
            share = summed_loss(model, rows, state) / tokens
        share.backward()
        loss += share.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip_norm)
    mean_loss, grad_norm = torch.stack([loss, norm]).tolist()  # the step's only wait for the device
    if math.isfinite(mean_loss) and math.isfinite(grad_norm):
        optimizer.step()
    optimizer.zero_grad()
    return mean_loss, grad_norm


class Trainer:
    """A run in progress: its model, optimizer, folder, and how far it is."""

    def __init__(
        self,
        config: ExperimentConfig,
        folder: RunFolder,
        corpus: Corpus,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.config = config
        self.folder = folder
        self.corpus = corpus
        self.model = model
        self.optimizer = optimizer
        self.device = next(model.parameters()).device
        self.windows = validation_windows(
            corpus.val,
            count=config.val_batches,
            seq_len=config.seq_len,
            midway=config.val_windows == "search",
        )
        self.carried: CarriedState | None = None
        if config.carry_state:
            self.carried = CarriedState(model, config.sequences_per_step, config.batch_size)
        self.step = 0  # steps done
        self.progress = Progress()

    def run(self) -> int:
        """The steps that remain, then the final validation. Returns the exit code."""
        config = self.config
        bar = tqdm(total=config.num_batches, initial=self.step, unit="step", disable=None)
        self.model.train()
        with bar, StopRequest() as stop:
            while self.step < config.num_batches and not stop.requested():
                row: dict[str, Any] = {"step": self.step}
                with stop.between_forwards(self.model):
                    if _due(self.step, config.validate_every):
                        row |= self.validate()
                        _say(bar, self.validation_line(row))
                    if self.step > 0 and _due(self.step, config.generate_every):
                        row["sample"] = self.sample()
                        _say(bar, f"step {self.step}, a sample:\n{row['sample']}\n")
                if stop.requested():
                    break  # the resumed run does what this one was about to do
                row |= self.train_one_step()
                self.folder.log(row)
                bar.set_postfix_str(_progress_text(row), refresh=False)
                bar.update()
                if _due(self.step, config.save_every) or self.step == config.num_batches:
                    self.folder.save_step(self.checkpoint(), config.keep_last)
                    self.folder.forget_replaced()
            bar.close()
            if stop.requested():
                saved = self.folder.save_step(self.checkpoint(), config.keep_last)
                print(f"stopped after {self.step} steps, saved {saved}")
            elif self.finish(stop):
                return 0
            else:
                print("stopped before the end of the final validation, all weights are saved")
            self.say_how_to_resume()
            return 128 + stop.signal_number

    def say_how_to_resume(self) -> None:
        config = shlex.quote(str(self.folder.file("config.yaml")))
        print(f"go on with: python train.py --config {config} --resume", flush=True)

    def train_one_step(self) -> dict[str, Any]:
        """Draw the step's batch, train on it, and return what metrics.jsonl says about it."""
        config, step = self.config, self.step
        began = time.perf_counter()
        torch.manual_seed(derive_seed(config.seed, step, "dropout"))
        batch, states = self._draw_batch()
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        loss, grad_norm = train_step(
            self.model, self.optimizer, batch.to(self.device), config, states
        )
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if not finite:
            if config.on_nonfinite == "stop":
                raise UserError(
                    f"step {step}: loss {loss}, gradient norm {grad_norm}: stopped, the earlier "
                    f"checkpoints are good; resume with on_nonfinite=skip, or start again with a "
                    f"lower learning_rate"
                )
            self.progress.skipped_steps += 1
            if self.carried is not None:
                self.carried.begin()  # what made the loss infinite may be in the state by now
        seconds = time.perf_counter() - began
        self.step += 1
        self.progress.seconds += seconds
        return {
            # JSON has no nan: a skipped step has neither loss nor norm.
            "train_loss": loss if finite else None,
            "train_bpc": bits_per_byte(loss) if finite else None,
            "grad_norm": grad_norm if finite else None,
            "skipped_steps": self.progress.skipped_steps,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "tokens": self.step * config.tokens_per_step,
            "tokens_per_second": config.tokens_per_step / seconds,
            "seconds": self.progress.seconds,
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }

    def _draw_batch(self) -> tuple[torch.Tensor, Sequence[MegalodonCache] | None]:
        """The step's batch, and the states before it where the run carries them."""
        config = self.config
        if self.carried is None:
            batch = training_batch(
                self.corpus.train,
                seed=config.seed,
                step=self.step,
                batch_size=config.sequences_per_step,
                seq_len=config.seq_len,
            )
            return batch, None
        batch, begins = _stream_batch(self.corpus, config, step=self.step)
        if begins:
            self.carried.begin()
        return batch, self.carried.caches

    def validate(self) -> dict[str, float]:
        """The loss on the fixed windows; keeps the weights if they are the best so far."""
        loss = evaluate(self.model, self.windows, use_autocast=self.config.use_autocast)
        if not math.isfinite(loss):
            raise UserError(
                f"step {self.step}: validation loss {loss}: stopped, the earlier checkpoints are "
                f"good; start again with a lower learning_rate"
            )
        # Without the file the best loss is another folder's, whose checkpoint was resumed here.
        best = self.progress.best_val_loss if self.folder.file("best.pt").exists() else math.inf
        if self.config.keep_best and loss < best:
            self.progress.best_val_loss = loss
            self.folder.save("best.pt", self.checkpoint(with_optimizer=False))
        return {"val_loss": loss, "val_bpc": bits_per_byte(loss)}

    def validation_line(self, row: dict[str, Any]) -> str:
        return (
            f"step {self.step}: validation loss {row['val_loss']:.4f}, {row['val_bpc']:.4f} BPC "
            f"({self.progress.seconds:.0f} s of training)"
        )

    def sample(self) -> str:
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
        )
        return PrintableDecoder().decode(prompt + made, final=True)

    def finish(self, stop: StopRequest) -> bool:
        """Save final.pt, validate on the windows and the whole split, and show a sample.

        Returns whether all was done before a signal came.
        """
        config = self.config
        self.folder.save("final.pt", self.checkpoint(with_optimizer=False))
        row: dict[str, Any] = {"step": self.step}
        done = False
        with stop.between_forwards(self.model):
            row |= self.validate()
            print(self.validation_line(row), flush=True)
            if config.full_validation:
                loss = full_validation(
                    self.model,
                    self.corpus.val,
                    seq_len=config.seq_len,
                    use_autocast=config.use_autocast,
                )
                row |= {"full_val_loss": loss, "full_val_bpc": bits_per_byte(loss)}
                print(f"whole validation split: {loss:.4f}, {row['full_val_bpc']:.4f} BPC")
            if config.generate_every:
                row["sample"] = self.sample()
                print(f"step {self.step}, a sample:\n{row['sample']}\n")
            done = True
        if not done:
            return False
        row |= {
            "tokens": self.step * config.tokens_per_step,
            "seconds": self.progress.seconds,
            "skipped_steps": self.progress.skipped_steps,
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        self.folder.log(row)
        print(f"final weights: {self.folder.file('final.pt')}", flush=True)
        return True

    def checkpoint(self, *, with_optimizer: bool = True) -> Checkpoint:
        return Checkpoint(
            config=self.config.used(),
            step=self.step,
            corpus_sha256=self.corpus.sha256,
            progress=asdict(self.progress),
            model_state=self.model.state_dict(),
            optimizer_state=self.optimizer.state_dict() if with_optimizer else None,
            carried_state=(
                self.carried.state_dict() if with_optimizer and self.carried is not None else None
            ),
        )

    def restore(self, checkpoint: Checkpoint, path: Path) -> None:
        """Go on where `checkpoint`, read from `path`, was made."""
        if checkpoint.corpus_sha256 != self.corpus.sha256:
            raise UserError(
                f"{path}: trained on another text than data_path={self.config.data_path} "
                f"(SHA-256 {checkpoint.corpus_sha256[:16]}..., here {self.corpus.sha256[:16]}...)"
            )
        load_weights(self.model, checkpoint, path)
        try:
            _load_optimizer(self.optimizer, checkpoint.optimizer_state or {})
            self.progress = _read_progress(checkpoint.progress)
        except ValueError as error:
            raise UserError(f"{path}: damaged: {error}") from error
        if self.carried is not None:
            try:
                self.carried.load_state_dict(checkpoint.carried_state or {})
            except ValueError as error:
                raise UserError(f"{path}: its carried state does not fit: {error}") from error
        self.step = checkpoint.step


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over the moments of a saved Adam; its settings are those of this run's config.

    Raises ValueError for moments that do not fit the parameters.
    """
    own = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = state.get("state")
    if not isinstance(saved, dict):
        raise ValueError("the optimizer has no state")
    for index, moments in saved.items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise ValueError("the optimizer has the state of another model")
        shape = parameters[index].shape
        wanted = {"step": torch.Size(()), "exp_avg": shape, "exp_avg_sq": shape}
        if not isinstance(moments, dict) or wanted != {
            name: isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape
            for name, value in moments.items()
        }:
            raise ValueError(f"the optimizer's state of parameter {index} does not fit it")
    optimizer.load_state_dict({"state": saved, "param_groups": own["param_groups"]})


def _read_progress(saved: dict[str, Any]) -> Progress:
    """Raises ValueError unless `saved` holds the numbers of a Progress."""
    kinds = {"seconds": (int, float), "skipped_steps": (int,), "best_val_loss": (int, float)}
    if saved.keys() != kinds.keys() or not all(
        isinstance(saved[name], kind) for name, kind in kinds.items()
    ):
        raise ValueError("the counts of its progress are missing or of the wrong kind")
    return Progress(**saved)


def _check_resumable(checkpoint: Checkpoint, path: Path, config: ExperimentConfig) -> None:
    """Raise UserError unless going on from `checkpoint` with `config` continues the same run."""
    if checkpoint.optimizer_state is None:
        raise UserError(
            f"{path}: holds weights only; resume from a checkpoint_*.pt of the same folder"
        )
    before = checkpoint.experiment(path)
    if before.model != config.model:
        raise UserError(
            f"{path}: holds model: {before.model}, the config asks for model: {config.model}"
        )
    then, now = (
        {**each.used(), "batch_size x grad_accum_every": each.sequences_per_step}
        for each in (before, config)
    )
    free = FREE_ON_RESUME - ({"num_batches"} if config.schedule == "cosine" else set())
    differing = [key for key in now if key not in free and then[key] != now[key]]
    if differing:
        changes = ", ".join(f"{key}={now[key]} (was {then[key]})" for key in differing)
        raise UserError(f"{path}: the run to resume has another config: {changes}; set it back")
    if checkpoint.step > config.num_batches:
        raise UserError(
            f"num_batches={config.num_batches}: {path} is at step {checkpoint.step} already; "
            f"raise num_batches"
        )


def _stream_batch(corpus: Corpus, config: ExperimentConfig, step: int) -> tuple[torch.Tensor, bool]:
    return stream_batch(
        corpus.train,
        seed=config.seed,
        step=step,
        streams=config.sequences_per_step,
        seq_len=config.seq_len,
        length=config.carry_steps,
    )


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _say(bar: tqdm[NoReturn], text: str) -> None:
    """Print above the bar, at once: a log file may be all that is left of a killed run."""
    bar.write(text)
    sys.stdout.flush()


def _progress_text(row: dict[str, Any]) -> str:
    if row["train_loss"] is None:
        return "not finite, skipped"
    return (
        f"loss {row['train_loss']:.3f}, {row['train_bpc']:.3f} BPC, "
        f"{row['tokens_per_second']:,.0f} tokens/s"
    )
