"""The loop: one for every task, in one process or under DeepSpeed's launcher. What is learned the task knows."""

import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cogvideo.config import to_dict
from cogvideo.logs import get_logger, progress
from cogvideo.training.config import TrainConfig
from cogvideo.training.engine import clips_itself, make_engine
from cogvideo.training.metrics import Averages, MetricsFile, draw_curves, peak_memory_mib
from cogvideo.training.optimiser import learning_rate
from cogvideo.training.randomness import seed_dropout
from cogvideo.training.record import write_record
from cogvideo.training.state import load_state, newest_state, save_state
from cogvideo.training.tasks import ClipTask, Task
from cogvideo.training.tokenizer_task import TokenizerTask

log = get_logger(__name__)

Preview = Callable[[Task, int, Path], None]
"""Called with the task, the number of steps done, and the file to write a sample sheet to."""


@dataclass(frozen=True)
class StepResult:
    grad_norm: float | None
    good: bool
    """Whether every process's losses were finite; if not, the weights are as before."""


def make_task(config: TrainConfig, device: torch.device, rank: int = 0, world: int = 1) -> Task:
    if config.task == "tokenizer":
        return TokenizerTask(config, device, rank, world)
    return ClipTask(config, device, rank, world)


class Trainer:
    """One run in its folder. Call `train` once."""

    def __init__(
        self, config: TrainConfig, device: torch.device, *, resume: bool = False, preview: Preview | None = None
    ) -> None:
        """Raises: ValueError, OSError before anything is written, for whatever does not fit."""
        self.config, self.preview, self.device = config, preview, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.accumulation = config.train.accumulation(self.world)
        self.metrics_file = MetricsFile(config.run_dir / "metrics.jsonl")
        found = newest_state(self._states) if self._states.is_dir() else None
        if not resume and (found or self.metrics_file.path.exists()):
            raise ValueError(f"{config.run_dir} holds a run already; give --resume to go on, or another run_dir")
        self.task = make_task(config, device, self.rank, self.world)
        self.engine = make_engine(self.task.objective, config, self.world)
        self.averages = Averages()
        self.step = self.skipped = 0
        self.bad_in_a_row = 0
        if found:
            self._restore(found)
        elif resume:
            log.info("%s holds no checkpoint; starting from the beginning", config.run_dir)
        self._stop_asked = False

    @property
    def _states(self) -> Path:
        return self.config.run_dir / "checkpoints"

    def train(self) -> dict[str, float]:
        """Run to the last step, a signal or the time limit, save, export; returns the last logged metrics."""
        loop, logs = self.config.train, self.config.log
        if self.rank == 0:
            self.config.run_dir.mkdir(parents=True, exist_ok=True)
            write_record(self.config.run_dir, self.config)
            self.metrics_file.rewind(self.step)
        board = self._open_board()
        restore_signals = self._catch_signals()
        deadline = math.inf if loop.time_limit_minutes is None else time.monotonic() + 60 * loop.time_limit_minutes
        batches = self.task.batches(self.step)
        last: dict[str, float] = {}
        tokens, since = 0, time.monotonic()
        bar = progress(loop.last_step, f"training {self.config.task}", "steps", initial=self.step)
        saved_at = self.step if self.step else -1
        try:
            while self.step < loop.last_step:
                batch = next(batches)
                result = self._one_step(batch)
                self._count_bad(result.good)
                self.task.after_step(self.step)
                self.step += 1
                tokens += self.task.tokens(batch)
                if result.grad_norm is not None and math.isfinite(result.grad_norm):
                    self.averages.add({"grad_norm": (result.grad_norm, 1.0)})
                bar.update(1)
                final = self.step == loop.last_step
                if self.step % logs.every == 0 or final:
                    elapsed = time.monotonic() - since
                    last = self._log_line(tokens, elapsed, board)
                    bar.set_postfix_str(f"loss {last.get('loss', math.nan):.4f}")
                    tokens, since = 0, time.monotonic()
                stop = self._agree(self._stop_asked or time.monotonic() > deadline)
                if self.step % logs.validate_every == 0 or final:
                    self._validate(board)
                if self.step % logs.save_every == 0 or final or stop:
                    self.save()
                    saved_at = self.step
                if logs.preview_every and (self.step % logs.preview_every == 0 or final):
                    self._preview()
                if stop:
                    log.warning("stopped at step %d as asked; --resume goes on from here", self.step)
                    break
            if saved_at != self.step:
                self.save()
        finally:
            bar.close()
            restore_signals()
            getattr(batches, "close", lambda: None)()
            if board is not None:
                board.finish()
        return last

    def save(self) -> None:
        """A checkpoint to resume from, the model in our own format, and the curves so far."""
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "averages": self.averages.sums,
            "task": self.task.extra_state(),
            "config": to_dict(self.config),
        }
        save_state(self.engine, self._states, self.step, state, self.config.log.keep_last)
        self.task.export(self.config.run_dir / "export", self.step)
        if self.rank == 0:
            draw_curves(self.metrics_file.read(), self.config.run_dir / "curves.png")

    def _one_step(self, batch: Any) -> StepResult:
        """Forward and backward over the step's micro-batches, then one update, unless a loss was not finite."""
        loop = self.config.train
        self.engine.train()
        good = True
        for micro in range(self.accumulation):
            # over all processes, so that dropout is the same however the batch is shared out
            seed_dropout(loop.seed, self.step, self.rank + self.world * micro)
            outcome = self.engine(self.task.part(batch, micro, self.accumulation))
            loss = outcome.loss
            if torch.isfinite(loss):
                self.averages.add(outcome.metrics)
            else:
                good = False
                loss = _no_gradient(self.engine.module)
            self.engine.backward(loss)
            last = micro == self.accumulation - 1
            if not last:
                self.engine.step()
        good = not self._agree(not good)
        rate = learning_rate(self.step, loop.steps, self.config.optimiser) if good else 0.0
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        norm = self._clip()
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        return StepResult(None if norm is None else float(norm), good)

    def _clip(self) -> float | None:
        if not clips_itself(self.config):
            return None
        limit = self.config.optimiser.grad_clip or math.inf
        learned = [p for p in self.engine.module.parameters() if p.requires_grad]
        return float(torch.nn.utils.clip_grad_norm_(learned, limit))

    def _count_bad(self, good: bool) -> None:
        if good:
            self.bad_in_a_row = 0
            return
        self.skipped += 1
        self.bad_in_a_row += 1
        log.warning("step %d has a loss that is not finite; it is skipped", self.step + 1)
        if self.bad_in_a_row >= self.config.train.max_bad_steps:
            raise ValueError(
                f"{self.bad_in_a_row} steps in a row had a NaN or infinite loss, at step {self.step + 1}; "
                "lower optimiser.lr and --resume from the last checkpoint"
            )

    def _log_line(self, tokens: int, elapsed: float, board: Any) -> dict[str, float]:
        means = self.averages.means()
        self.averages.clear()
        steps = self.config.log.every
        means |= {
            "lr": self.engine.optimizer.param_groups[0]["lr"],
            "skipped": float(self.skipped),
            "tokens_per_second": tokens * self.world / max(elapsed, 1e-9),
            "seconds_per_step": elapsed / steps,
            "memory_mib": peak_memory_mib(self.device),
        } | self.task.report()
        self._write({"step": self.step} | means, board)
        return means

    @torch.no_grad()
    def _validate(self, board: Any) -> None:
        batches = self.task.validation_batches()
        if not batches:
            return
        self.engine.eval()
        averages = Averages()
        for batch in batches:
            averages.add(self.engine(self.task.part(batch, 0, 1)).metrics)
        means = averages.means()
        self._write({"step": self.step} | {f"validation/{name}": value for name, value in means.items()}, board)

    def _preview(self) -> None:
        if self.preview is None or self.world > 1:
            return  # in several processes a sheet could not be made without the others
        self.engine.eval()
        path = self.config.run_dir / "previews" / f"step_{self.step:08d}.png"
        try:
            self.preview(self.task, self.step, path)
        except (ValueError, OSError) as error:
            log.warning("no sample sheet at step %d: %s", self.step, error)
        except Exception:  # of any kind: a picture to look at must not end a long run
            log.warning("no sample sheet at step %d", self.step, exc_info=True)

    def _write(self, record: dict[str, Any], board: Any) -> None:
        if self.rank == 0:
            self.metrics_file.write(record)
            if board is not None:
                board.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def _open_board(self) -> Any:
        mode = self.config.log.wandb
        if mode == "off" or self.rank != 0:
            return None
        import wandb

        config = json.loads(json.dumps(to_dict(self.config)))
        return wandb.init(project="cogvideo", mode=mode, dir=self.config.run_dir, config=config)

    def _restore(self, place: Path) -> None:
        state = load_state(self.engine, place)
        self.step, self.skipped = state["step"], state["skipped"]
        self.averages.sums = state["averages"]
        self.task.load_extra_state(state["task"])
        log.info("resuming at step %d", self.step)

    def _agree(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.world == 1:
            return flag
        told = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told.item())

    def _catch_signals(self) -> Callable[[], None]:
        """SIGTERM and a first Ctrl-C end the run after the current step, saved; returns what undoes this."""

        def ask(number: int, frame: Any) -> None:
            if self._stop_asked:
                raise KeyboardInterrupt
            self._stop_asked = True

        old = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}

        def undo() -> None:
            for number, handler in old.items():
                signal.signal(number, handler)

        return undo


def _no_gradient(module: torch.nn.Module) -> torch.Tensor:
    """A loss of zero with a zero gradient for every parameter: keeps all processes in step."""
    return sum((p.sum() * 0.0 for p in module.parameters() if p.requires_grad), start=torch.zeros(()))
