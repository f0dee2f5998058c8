"""The loop: one for every task, in one process or under DeepSpeed's launcher. What is learned the task knows."""

import math
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cogvideo.config import to_dict
from cogvideo.distributed import any_rank, lost_peer_as_error, run_on_all_ranks
from cogvideo.logs import get_logger, progress
from cogvideo.training.checkpointing import load_state, newest_state, save_state
from cogvideo.training.config import TrainConfig
from cogvideo.training.deepspeed_engine import deepspeed_settings, make_engine
from cogvideo.training.engine_state import EngineState
from cogvideo.training.metrics import Averages, draw_curves
from cogvideo.training.record import write_record
from cogvideo.training.sinks import Sinks
from cogvideo.training.step import Stepper, StepResult
from cogvideo.training.tasks.clips import ClipTask, Task
from cogvideo.training.tasks.superres import SuperresTask
from cogvideo.training.tasks.tokenizer import TokenizerTask
from cogvideo.training.throughput import Throughput, compute_dtype, measured_peak, warn_of_slow_products

log = get_logger(__name__)

Preview = Callable[[Task, int, Path], None]
"""Called with the task, the number of steps done, and the file to write a sample sheet to."""

CURVES_SECONDS = 60.0
"""Curves are drawn no more often than this, but at the end."""


def make_task(config: TrainConfig, device: torch.device, rank: int = 0, world: int = 1) -> Task:
    if config.task == "tokenizer":
        return TokenizerTask(config, device, rank, world)
    if config.task == "superres":
        return SuperresTask(config, device, rank, world)
    return ClipTask(config, device, rank, world)


class Trainer:
    """One run in its folder. Call `train` once."""

    def __init__(
        self, config: TrainConfig, device: torch.device, *, resume: bool = False, preview: Preview | None = None
    ) -> None:
        """Raises: ValueError, OSError before anything is written, for whatever does not fit."""
        self.config, self.preview, self.device = config, preview, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        deepspeed_settings(config, self.world)  # refuses what does not go together, before anything is read
        self.sinks = Sinks(config)
        found = newest_state(self._states)
        if not resume and (found or self.sinks.file.path.exists()):
            raise ValueError(f"{config.run_dir} holds a run already; give --resume to go on, or another run_dir")
        warn_of_slow_products(device, config.train)
        self.task = make_task(config, device, self.rank, self.world)
        self.engine = make_engine(self.task.objective, config, self.world)
        self.state = EngineState(self.engine, self.task.moving)
        self.averages = Averages()
        self.stepper = Stepper(self.engine, self.task, config, device, self.averages)
        self.step = self.skipped = self.bad_in_a_row = 0
        if found:
            self._restore(found)
        elif resume:
            log.info("%s holds no checkpoint; starting from the beginning", config.run_dir)
        self._saved_at: int | None = None  # a run killed between its last checkpoint and its export makes both again
        self._stop_asked = False
        self._drawn_at = -math.inf

    @property
    def _states(self) -> Path:
        return self.config.run_dir / "checkpoints"

    def train(self) -> dict[str, float]:
        """Run to the last step, a signal or the time limit, save, export; returns the last logged metrics.

        Raises: OSError if the last checkpoint cannot be written, or another process is lost; ValueError after too many
        bad steps in a row.
        """
        if self.rank == 0:
            self.config.run_dir.mkdir(parents=True, exist_ok=True)
            write_record(self.config.run_dir, self.config)
            self.sinks.open(self.step)
        restore_signals = self._catch_signals()
        batches = self.task.batches(self.step)
        try:
            with lost_peer_as_error(self._how_to_go_on):
                return self._loop(batches)
        finally:
            restore_signals()
            getattr(batches, "close", lambda: None)()
            self.sinks.close()

    def _loop(self, batches: Any) -> dict[str, float]:
        loop, logs = self.config.train, self.config.log
        deadline = math.inf if loop.time_limit_minutes is None else time.monotonic() + 60 * loop.time_limit_minutes
        last: dict[str, float] = {}
        peak = 1e12 * logs.peak_tflops if logs.peak_tflops else measured_peak(self.device, compute_dtype(loop))
        throughput = Throughput(self.device, self.world, peak)
        bar = progress(loop.last_step, f"training {self.config.task}", "steps", initial=self.step)
        with bar:
            while self.step < loop.last_step:
                batch = next(batches)
                logged = self._is_logged(self.step + 1)
                result = self._one_step(batch)
                self._count_bad(result)
                self.task.after_step(self.step, result.good)
                self.step += 1
                final = self.step == loop.steps  # not at stop_at, from which another run goes on as if nothing were
                throughput.add(self.task.tokens(batch), self.task.flops(batch))
                if result.grad_norm is not None and math.isfinite(result.grad_norm):
                    self.averages.add({"grad_norm": (result.grad_norm, 1.0)})
                if logged:
                    norms = self.stepper.gradient_norms.take(result.grad_norm or 0.0) if result.good else {}
                    last = self._log_line(norms | throughput.take(loop.last_step - self.step))
                    bar.set_postfix_str(_postfix(last), refresh=False)
                bar.update(1)
                stop = any_rank(self._stop_asked or time.monotonic() > deadline, self.device)
                if self.step % logs.validate_every == 0 or final:
                    self._validate()
                ends = stop or self.step == loop.last_step
                if self.step % logs.save_every == 0 or ends:
                    self.save(must=ends)
                if logs.preview_every and (self.step % logs.preview_every == 0 or final):
                    self._preview()
                if stop:
                    log.warning("stopped at step %d as asked; --resume goes on from here", self.step)
                    break
            if self._saved_at != self.step:
                self.save()
        return last

    def _is_logged(self, step: int) -> bool:
        return step % self.config.log.every == 0 or step == self.config.train.steps

    def save(self, *, must: bool = True) -> None:
        """A checkpoint to resume from, the model in our own format, and the curves so far.

        Where a disk is full, say, a run goes on unless it `must` be saved now: the next time there may be room.
        Raises: OSError, if it must.
        """
        try:
            self._save(whole=must)
            self._saved_at = self.step
        except OSError as error:
            if must:
                reason = f"step {self.step} could not be saved: {error}; {self._how_to_go_on()}"
                raise OSError(error.errno, reason) from error
            wait = self.config.log.save_every
            log.error("step %d could not be saved: %s; trying again %d steps on", self.step, error, wait)

    def _save(self, whole: bool) -> None:
        averages: list[Any] = run_on_all_ranks(lambda: self.averages.sums)
        numbers = {
            "step": self.step,
            "skipped": self.skipped,
            "bad_in_a_row": self.bad_in_a_row,
            "averages": averages,
            "config": to_dict(self.config),
        }
        run_on_all_ranks(self._record_again if self.rank == 0 else None)
        save_state(self.state, self._states, self.step, numbers, self.config.log.keep_last)
        run_on_all_ranks(lambda: self.task.export(self.config.run_dir / "export", self.step))
        draws = self.rank == 0 and (whole or time.monotonic() - self._drawn_at > CURVES_SECONDS)
        run_on_all_ranks(self._draw if draws else None)

    def _record_again(self) -> None:
        if not (self.config.run_dir / "config.yaml").is_file():
            log.warning("%s has vanished; it is made anew", self.config.run_dir)
            write_record(self.config.run_dir, self.config)

    def _draw(self) -> None:
        draw_curves(self.sinks.file.read(), self.config.run_dir / "curves.png")
        self._drawn_at = time.monotonic()

    def _one_step(self, batch: Any) -> StepResult:
        return self.stepper.take(batch, self.step, with_norms=self._is_logged(self.step + 1))

    def _count_bad(self, result: StepResult) -> None:
        self.skipped += result.overflowed or not result.good
        if result.good:
            self.bad_in_a_row = 0
            return
        self.bad_in_a_row += 1
        log.warning("step %d has a loss or gradient that is not finite; it is skipped", self.step + 1)
        if self.bad_in_a_row >= self.config.train.max_bad_steps:
            raise ValueError(
                f"{self.bad_in_a_row} steps in a row had a NaN or infinite loss or gradient, at step {self.step + 1}; "
                "lower optimiser.lr and --resume from the last checkpoint"
            )

    def _log_line(self, numbers: dict[str, float]) -> dict[str, float]:
        means = self.averages.means()
        self.averages.clear()
        rate = {"lr": self.engine.optimizer.param_groups[0]["lr"], "skipped": float(self.skipped)}
        means |= rate | numbers | self.task.report()
        self._write({"step": self.step} | means)
        return means

    @torch.no_grad()
    def _validate(self) -> None:
        batches = self.task.validation_batches()
        if not batches:
            return
        self.engine.eval()
        averages, parts = Averages(), self.config.train.accumulation(self.world)
        for batch in batches:
            for index in range(parts):
                averages.add(self.engine(self.task.part(batch, index, parts)).metrics)
        means = averages.means()
        self._write({"step": self.step} | {f"validation/{name}": value for name, value in means.items()})

    def _preview(self) -> None:
        if self.preview is None or self.rank != 0 or (self.world > 1 and self.config.deepspeed.stage == 3):
            return  # with its weights spread, one process cannot draw a sheet alone
        self.engine.eval()
        path = self.config.run_dir / "previews" / f"step_{self.step:08d}.png"
        try:
            self.preview(self.task, self.step, path)
            self.sinks.picture("preview", path, self.step)
        except (ValueError, OSError) as error:
            log.warning("no sample sheet at step %d: %s", self.step, error)
        except Exception:  # of any kind: a picture to look at must not end a long run
            log.warning("no sample sheet at step %d", self.step, exc_info=True)

    def _write(self, record: dict[str, Any]) -> None:
        if self.rank == 0:
            self.sinks.write(record)

    def _restore(self, place: Path) -> None:
        numbers = load_state(self.state, place)
        if self.rank == 0:
            _warn_of_changes(numbers["config"], to_dict(self.config))
        self.step, self.skipped, self.bad_in_a_row = (numbers[k] for k in ("step", "skipped", "bad_in_a_row"))
        shares = numbers["averages"]
        if len(shares) == self.world:
            self.averages.add(shares[self.rank])
        elif self.rank == 0:  # of another number of processes: means are over all of them anyway
            for share in shares:
                self.averages.add(share)
        log.info("resuming at step %d", self.step)

    def _how_to_go_on(self) -> str:
        try:
            newest = (self._states / "latest").read_text(encoding="utf-8").strip()
        except OSError:
            return "nothing was saved yet; start again"
        return f"{newest} is saved; go on from it with --resume"

    def _catch_signals(self) -> Callable[[], None]:
        """SIGTERM and a first Ctrl-C end the run after the current step, saved; returns what undoes this."""

        def ask(number: int, frame: Any) -> None:
            if self._stop_asked and number == signal.SIGINT:  # SIGTERM is repeated by launchers, which mean it once
                raise KeyboardInterrupt
            self._stop_asked = True

        old = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}

        def undo() -> None:
            for number, handler in old.items():
                signal.signal(number, handler)

        return undo


FREE_TO_CHANGE = re.compile(r"run_dir|log\..*|deepspeed\..*|train\.(steps|stop_at|time_limit_minutes|micro_batch_size)")
"""Settings that a run may go on with in another way; what it learns stays the same, or is meant to be longer."""


def _warn_of_changes(before: dict[str, Any], now: dict[str, Any], group: str = "") -> None:
    """Say which settings differ from those that the run had so far."""
    for name in sorted(before.keys() | now.keys()):
        old, new, key = before.get(name), now.get(name), f"{group}{name}"
        if isinstance(old, dict) and isinstance(new, dict):
            _warn_of_changes(old, new, f"{key}.")
        elif old != new and not FREE_TO_CHANGE.fullmatch(key):
            log.warning("the run had %s=%s so far and goes on with %s", key, old, new)


def _postfix(numbers: dict[str, float]) -> str:
    """Loss, speed and memory for the progress line."""
    shown = [f"loss {numbers.get('loss', math.nan):.4f}", f"{numbers['tokens_per_second']:,.0f} tokens/s"]
    if "mfu" in numbers:
        shown.append(f"MFU {numbers['mfu']:.1%}")
    shown.append(f"{numbers['memory_mib'] / 1024:.1f} GiB")
    return ", ".join(shown)
