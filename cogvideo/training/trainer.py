"""The training loop for every task, in one process or several: set up, build, resume, then step after step.

Not here: what is trained (`tasks/`), the optimiser and DeepSpeed's engine (`optimiser.py`, `deepspeed_engine.py`), the
files of a checkpoint (`checkpointing.py`).
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cogvideo.config import to_dict
from cogvideo.distributed import any_rank, lost_peer_as_error, max_over_ranks, run_on_all_ranks, store_barrier
from cogvideo.dtypes import FLOAT_DTYPES
from cogvideo.evaluation.networks import FeatureNetwork
from cogvideo.evaluation.packaged_networks import open_packaged
from cogvideo.files import remove_all_leftovers
from cogvideo.logs import get_logger, one_line, progress
from cogvideo.rng import seed_dropout
from cogvideo.training.checkpointing import (
    load_state,
    newest_state,
    resume_advice,
    save_state,
    saved_numbers,
)
from cogvideo.training.config import TrainConfig, changed_settings, check_resumable, errors_name_key, with_weights_named
from cogvideo.training.deepspeed_engine import (
    GradientNorms,
    averaged_weights,
    deepspeed_settings,
    inner_optimiser,
    make_engine,
    step_in_fp16,
    trainer_clips_gradients,
)
from cogvideo.training.metrics import Averages, MetricsWriter, draw_curves, progress_text, write_origin
from cogvideo.training.optimiser import GuardedAdamW, SpikeRule, ema_decay_after, is_finite_norm, learning_rate
from cogvideo.training.previews import PreviewWriter
from cogvideo.training.resources import Throughput, check_fp16, measure_peak_flops, warn_if_emulated
from cogvideo.training.resuming import changed_types, warn_of_other_masks
from cogvideo.training.state import TrainingState
from cogvideo.training.tasks.base import Metrics, Task, read_metrics
from cogvideo.training.tasks.clips import ClipTask
from cogvideo.training.tasks.superres import SuperresTask
from cogvideo.training.tasks.tokenizer import TokenizerTask

log = get_logger(__name__)

IS_FINITE = "is_finite"
"""An extra metric, read along with those of an objective: whether its loss is finite."""
CODEBOOK_STEP = "tokenizer.continuous_steps"
CURVES_SECONDS = 60.0
"""Curves are redrawn no more often than this, except at the end."""


@dataclass(frozen=True)
class StepResult:
    grad_norm: float | None
    """Before clipping; None if DeepSpeed does not report it."""
    is_finite: bool
    """Whether loss and gradients were finite on every rank; if not, weights and moments are unchanged."""
    overflowed: bool = False
    """The fp16 loss scaler skipped the update because gradients overflowed, as happens occasionally."""
    is_spike: bool = False
    """The update was skipped because of its gradient norm (train.skip_spikes)."""

    @property
    def is_skipped(self) -> bool:
        """Whether weights and moments are unchanged."""
        return self.overflowed or self.is_spike or not self.is_finite


def make_task(config: TrainConfig, device: torch.device, rank: int = 0, world_size: int = 1) -> Task[Any]:
    if config.task == "tokenizer":
        return TokenizerTask(config, device, rank, world_size)
    if config.task == "superres":
        return SuperresTask(config, device, rank, world_size)
    return ClipTask(config, device, rank, world_size)


class Trainer:
    """One run in its folder. Call `train` once."""

    def __init__(self, config: TrainConfig, device: torch.device, *, resume: bool = False) -> None:
        """Set up, build, resume.

        Raises: ValueError, OSError before anything is written, if settings, data or checkpoints do not fit.
        """
        # set up: fail on contradictory settings and occupied folders before reading data or weights
        self.config, self.device = config, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        check_fp16(config.train)
        deepspeed_settings(config, self.world_size)
        self.accumulation = config.train.accumulation(self.world_size)
        self.previews = PreviewWriter(config.data.image_tokenizer, config.data.high_res_tokenizer)
        self._networks = self._distance_networks()
        self.writer = MetricsWriter(config)
        self.checkpoints = config.run_dir / "checkpoints"
        newest = newest_state(self.checkpoints)
        if not resume and (newest or self.writer.file.read()):
            raise ValueError(f"{config.run_dir} already holds a run; give --resume to continue it, or another run_dir")
        warn_if_emulated(device, config.train, config.init.trunk_weights)
        if config.optimiser.warmup_steps >= config.train.steps:
            log.warning(
                "optimiser.warmup_steps=%d is not below train.steps=%d, so the learning rate never reaches "
                "optimiser.lr; lower it",
                config.optimiser.warmup_steps,
                config.train.steps,
            )
        if config.log.preview_every and config.deepspeed.stage == 3:
            log.warning("no sample sheets are drawn: they need whole weights, and deepspeed.stage=3 partitions them")

        # build
        self.task = make_task(config, device, self.rank, self.world_size)
        self.engine = make_engine(self.task.objective, config, self.world_size)
        with_ema = config.train.ema_decay is not None
        self.state = TrainingState(self.engine, self.task.updated_without_gradient, with_ema=with_ema)
        if with_ema:
            log.info(
                "validation and sample sheets use the moving average of weights (train.ema_decay=%g); exports hold %s",
                config.train.ema_decay,
                "it too" if config.export.weights == "ema" else "the last weights (export.weights=last)",
            )
        self.averages = Averages()
        self.gradient_norms = GradientNorms(self.engine, self.task.component_of)
        inner_optimiser(self.engine).allow_update = self._allow_update
        self.spike_rule = SpikeRule(config.train.skip_spikes)
        self._is_finite = True
        self._clipped_norm: float | None = None

        # resume
        self.step = self.skipped = self.spikes = self.bad_in_a_row = 0
        if newest:
            self._resume(newest)
        elif resume:
            log.info("%s holds no checkpoint; starting from the beginning", config.run_dir)
        self._saved_at: int | None = None  # also after resuming: a run killed between checkpoint and export redoes both
        self._stop_signal = 0
        self._curves_drawn_at = -math.inf
        self._started_at, self._preview_seconds = time.monotonic(), 0.0

    def _resume(self, checkpoint: Path) -> None:
        saved = saved_numbers(checkpoint)
        changes = list(changed_settings(saved["config"], to_dict(with_weights_named(self.config))))
        check_resumable(changes, self.config.run_dir)
        self.task.check_resumable(saved)
        load_state(self.state, checkpoint, changed_types(saved["config"]["train"], to_dict(self.config.train)))
        if self.rank == 0:
            for key, old, new in changes:
                if key == CODEBOOK_STEP and saved["step"] < min(old, new):
                    continue  # neither has had an effect yet
                log.warning("the run had %s=%s so far and continues with %s", key, old, new)
        self.step, self.skipped, self.bad_in_a_row = (saved[k] for k in ("step", "skipped", "bad_in_a_row"))
        self.spikes, norms = saved.get("spikes", 0), saved.get("norms", [])
        for norm in norms:
            self.spike_rule.add(norm)
        old_steps, steps = saved["config"]["train"]["steps"], self.config.train.steps
        rates = [learning_rate(self.step, length, self.config.optimiser) for length in (old_steps, steps)]
        if rates[0] != rates[1]:
            log.warning(
                "train.steps was %d and is %d now: the learning-rate schedule follows the new length, so at step %d "
                "the rate is %.3g instead of %.3g; to end a run early on the same schedule, set train.stop_at",
                *(old_steps, steps, self.step, rates[1], rates[0]),
            )
        warn_of_other_masks(saved, self.config, self.world_size)
        sums_by_rank = saved["averages"]
        if len(sums_by_rank) == self.world_size:
            self.averages.add(sums_by_rank[self.rank])
        elif self.rank == 0:  # saved by another number of processes: means are over all ranks, so any one may hold them
            for sums in sums_by_rank:
                self.averages.add(sums)
        log.info("resuming at step %d", self.step)

    def train(self) -> dict[str, float]:
        """Train until the last step, a signal or the time limit; save and export; return the last logged metrics.

        Raises: OSError if the last checkpoint cannot be written or another process is lost; ValueError after too many
        non-finite steps in a row; after a signal, once everything is saved, KeyboardInterrupt for Ctrl-C and
        SystemExit(128 + its number) for any other.
        """
        if self.rank == 0:
            for name in ("", "previews", "checkpoints", "export"):
                remove_all_leftovers(self.config.run_dir / name)
            self.writer.open(self.step)  # before anything is written: wandb or TensorBoard may fail to start
            write_origin(self.config.run_dir, self.config)
        with self._signals_request_stop():
            batches = self.task.batches(self.step)
            try:
                with lost_peer_as_error(lambda: resume_advice(self.checkpoints)):
                    metrics = self._loop(batches)
            finally:
                getattr(batches, "close", lambda: None)()
                self.writer.close()
            # on all ranks together: a launcher kills the others as soon as one exits with an error
            self._stop_signal = max_over_ranks(self._stop_signal, self.device)
        if self._stop_signal:
            raise KeyboardInterrupt if self._stop_signal == signal.SIGINT else SystemExit(128 + self._stop_signal)
        return metrics

    def _loop(self, batches: Iterator[Any]) -> dict[str, float]:
        loop, logs = self.config.train, self.config.log
        deadline = math.inf if loop.time_limit_minutes is None else time.monotonic() + 60 * loop.time_limit_minutes
        metrics: dict[str, float] = {}
        peak_flops = 1e12 * logs.peak_tflops if logs.peak_tflops else None
        if peak_flops is None:
            peak_flops = measure_peak_flops(self.device, FLOAT_DTYPES[loop.dtype])
        throughput = Throughput(self.device, self.world_size, peak_flops)
        with progress(loop.last_step, f"training {self.config.task}", "steps", initial=self.step) as bar:
            while self.step < loop.last_step:
                batch = next(batches)
                is_logged = self._is_logged(self.step)
                result = self.train_step(batch)
                self._count_skipped(result)
                self.task.after_step(self.step, not result.is_skipped)
                self.step += 1
                is_final = self.step == loop.steps  # not at stop_at: the run continued from there must look the same
                throughput.add(self.task.tokens(batch), self.task.flops(batch))
                if result.grad_norm is not None and math.isfinite(result.grad_norm):
                    self.averages.add({"grad_norm": (result.grad_norm, 1.0)})
                if is_logged:
                    norms = self.gradient_norms.take(result.grad_norm or 0.0) if not result.is_skipped else {}
                    metrics = self._log_metrics(norms | throughput.take(loop.last_step - self.step))
                    bar.set_postfix_str(progress_text(metrics), refresh=False)
                bar.update(1)
                stop = any_rank(bool(self._stop_signal) or time.monotonic() > deadline, self.device)
                if self.step % logs.validate_every == 0 or is_final:
                    self._validate()
                is_last = stop or self.step == loop.last_step
                if self.step % logs.save_every == 0 or is_last:
                    self.save(required=is_last)
                if logs.preview_every and (self.step % logs.preview_every == 0 or is_final):
                    with self._averaged_weights():
                        self._wait_for_rank_0("sample sheet", self._draw_preview)
                if logs.distances_every and (self.step % logs.distances_every == 0 or is_final):
                    with self._averaged_weights():
                        self._wait_for_rank_0("distances", self._measure_distances)
                if stop:
                    self._stop_signal = max_over_ranks(self._stop_signal, self.device)
                    break
            if self._saved_at != self.step:
                self.save()
        if self.step < loop.steps:
            log.warning("stopped at step %d of %d %s", self.step, loop.steps, self._reason_of_stop())
        if self.rank == 0 and not self._stop_signal:
            self.task.report()
        return metrics

    def _reason_of_stop(self) -> str:
        loop = self.config.train
        if self._stop_signal:
            return f"by {signal.Signals(self._stop_signal).name}; --resume continues from here"
        if self.step == loop.stop_at:
            return f"by train.stop_at={loop.stop_at}; raise it and --resume to continue from here"
        if loop.stop_at is not None and self.step > loop.stop_at:
            return f"already, beyond train.stop_at={loop.stop_at}; raise it and --resume to continue from here"
        return f"by train.time_limit_minutes={loop.time_limit_minutes:g}; --resume continues from here"

    def train_step(self, batch: Any) -> StepResult:
        """One optimiser step: forward and backward over the micro-batches, then the update. Every rank takes it.

        A non-finite loss or gradient must not reach weights or moments. Losses are read once, after the last backward
        pass, so that a GPU never waits for the host between micro-batches. A bad gradient only shows inside
        `engine.step()`: there DeepSpeed reduces, unscales, measures and clips the gradients before it calls the
        optimiser. So the decision is made at that point: the optimiser is a `GuardedAdamW`, which asks `_allow_update`
        before it changes anything. All ranks decide alike, because the loss flag is combined over ranks and the norm is
        global.
        """
        loop, engine = self.config.train, self.engine
        engine.train()
        of_forwards: list[Metrics] = []
        for index in range(self.accumulation):
            # micro-batches are numbered over all ranks: dropout depends on how many a step has, not on the ranks
            seed_dropout(loop.seed, self.step, self.rank + self.world_size * index)
            loss, metrics = engine(self.task.micro_batch(batch, index, self.accumulation))
            of_forwards.append({**metrics, IS_FINITE: (torch.isfinite(loss), 1.0)})
            engine.backward(loss)  # loss.backward(), divided by the number of micro-batches and reduced over ranks
            if index < self.accumulation - 1:
                engine.step()  # counts the micro-batch; nothing is updated before the last one

        read = read_metrics(of_forwards)
        finite = [bool(metrics.pop(IS_FINITE)[0]) for metrics in read]
        for metrics, is_finite in zip(read, finite, strict=True):
            if is_finite:
                self.averages.add(metrics)
        self._is_finite = not any_rank(not all(finite), self.device)
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, loop.steps, self.config.optimiser)
        if loop.ema_decay is not None:
            inner_optimiser(engine).ema_decay = ema_decay_after(self.step - self.skipped, loop.ema_decay)
        self._clipped_norm = self._clip_gradients() if trainer_clips_gradients(self.config) else None
        # engine.step calls GuardedAdamW.step, which calls _allow_update
        if loop.dtype == "fp16":
            if step_in_fp16(engine, loss_is_finite=self._is_finite):
                return StepResult(None, is_finite=True, overflowed=True)
        else:
            engine.step()
        norm = engine.get_global_grad_norm() if self._clipped_norm is None else self._clipped_norm
        is_finite = self._is_finite and is_finite_norm(norm)
        is_spike = is_finite and self.spike_rule.is_spike(norm)
        return StepResult(None if norm is None else float(norm), is_finite, is_spike=is_spike)

    def _allow_update(self, optimiser: GuardedAdamW) -> bool:
        """Whether AdamW may update weights and moments; called with the final gradients in place, on every rank."""
        norm = self._clipped_norm
        if not trainer_clips_gradients(self.config):
            norm = getattr(self.engine.optimizer, "_global_grad_norm", None)
        if not (self._is_finite and is_finite_norm(norm)) or self.spike_rule.is_spike(norm):
            return False
        if self._is_logged(self.step):
            self.gradient_norms.add(p for group in optimiser.param_groups for p in group["params"])
        return True

    def _clip_gradients(self) -> float:
        """Clip by global norm; returns the norm before clipping."""
        max_norm = self.config.optimiser.grad_clip or math.inf
        trainable = [p for p in self.engine.module.parameters() if p.requires_grad]
        return float(nn.utils.clip_grad_norm_(trainable, max_norm))

    def _count_skipped(self, result: StepResult) -> None:
        self.skipped += result.is_skipped
        if result.overflowed:
            scale = self.engine.optimizer.loss_scaler.cur_scale
            log.info("step %d overflows in fp16 and is skipped; the loss scale is now %g", self.step + 1, scale)
            return
        if result.is_spike:
            self.spikes += 1
            log.warning(
                "step %d has gradient norm %.3g, above %.3g (train.skip_spikes=%g), and is skipped",
                *(self.step + 1, result.grad_norm, self.spike_rule.limit, self.config.train.skip_spikes),
            )
        if result.grad_norm is not None and self._is_finite:
            self.spike_rule.add(result.grad_norm)
        if result.is_finite:
            self.bad_in_a_row = 0
            return
        self.bad_in_a_row += 1
        log.warning("step %d has a non-finite loss or gradient and is skipped", self.step + 1)
        if self.bad_in_a_row >= self.config.train.max_bad_steps:
            raise ValueError(
                f"{self.bad_in_a_row} steps in a row had a NaN or infinite loss or gradient, up to step "
                f"{self.step + 1}; lower optimiser.lr and --resume from the last checkpoint"
            )

    def _is_logged(self, step: int) -> bool:
        """Whether 0-based `step` ends with a line of metrics."""
        return (step + 1) % self.config.log.every == 0 or step + 1 == self.config.train.steps

    def _log_metrics(self, numbers: dict[str, float]) -> dict[str, float]:
        metrics = self.averages.means()
        self.averages.clear()
        schedule = {"lr": self.engine.optimizer.param_groups[0]["lr"], "skipped": float(self.skipped)}
        if self.config.train.skip_spikes is not None:
            schedule["spikes"] = float(self.spikes)
        metrics |= schedule | numbers | self.task.weight_metrics()
        self._write({"step": self.step} | metrics)
        return metrics

    @torch.no_grad()
    def _validate(self) -> None:
        batches = self.task.validation_batches()
        if not batches:
            return
        self.engine.eval()
        averages = Averages()
        with self._averaged_weights():
            for batch in batches:
                for index in range(self.accumulation):
                    _, metrics = self.engine(self.task.micro_batch(batch, index, self.accumulation))
                    averages.add(*read_metrics([metrics]))
        self._write({"step": self.step} | {f"validation/{name}": mean for name, mean in averages.means().items()})

    def _averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """With train.ema_decay, use the averaged weights inside the block; every rank must enter and leave it."""
        return contextlib.nullcontext() if self.config.train.ema_decay is None else averaged_weights(self.engine)

    def _distance_networks(self) -> dict[str, FeatureNetwork]:
        """The networks for log.distances_every. Raises: ValueError if they are not installed."""
        if not self.config.log.distances_every:
            return {}
        with errors_name_key("log.distances_every"):
            return open_packaged(self.device)

    def _wait_for_rank_0(self, what: str, work: Callable[[], None]) -> None:
        """Let rank 0 sample (`work`) while the others wait, unless that has taken too much of the run's time so far.

        Any failure is only logged: it must not end a long run.
        """
        if self.config.deepspeed.stage == 3:
            return  # sampling reads weights that are gathered for a layer's forward pass only
        if self.rank == 0:
            start = time.monotonic()
            elapsed, share = start - self._started_at, self.config.log.preview_share
            if self.world_size > 1 and self._preview_seconds > share * elapsed:
                log.info(
                    "no %s at step %d: sample sheets and distances have taken %.0f of %.0f s so far, above "
                    "log.preview_share=%g",
                    *(what, self.step, self._preview_seconds, elapsed, share),
                )
            else:
                self.engine.eval()
                try:
                    work()
                except (ValueError, OSError) as error:
                    log.warning("no %s at step %d: %s", what, self.step, error)
                except Exception:
                    log.warning("no %s at step %d", what, self.step, exc_info=True)
                seconds = time.monotonic() - start
                self._preview_seconds += seconds
                if self.world_size > 1 and seconds > 1:
                    log.info("%s at step %d took %.0f s, for which all processes waited", *(what, self.step, seconds))
        store_barrier()

    def _draw_preview(self) -> None:
        path = self.previews.write(self.task, self.step, self.config.run_dir / "previews")
        self.writer.write_image("preview", path, self.step)

    def _measure_distances(self) -> None:
        assert isinstance(self.task, ClipTask)
        distances = self.previews.distances(self.task, self._networks, self.config.log.distances_clips)
        self._write({"step": self.step} | {f"validation/{name}": value for name, value in distances.items()})

    def _write(self, record: dict[str, Any]) -> None:
        if self.rank == 0:
            self.writer.write(record)

    def save(self, *, required: bool = True) -> None:
        """Write a checkpoint to resume from, the exported model and the curves so far.

        Unless `required`, a failure (a full disk, say) is only logged: there may be space the next time.
        Raises: OSError if it is required and fails.
        """
        try:
            self._save(is_last=required)
            self._saved_at = self.step
        except OSError as error:
            if required:
                reason = f"step {self.step} could not be saved: {one_line(error)}; {resume_advice(self.checkpoints)}"
                raise OSError(error.errno, reason) from error
            every = self.config.log.save_every
            log.error("step %d could not be saved: %s; trying again in %d steps", self.step, one_line(error), every)

    def _save(self, is_last: bool) -> None:
        progress_so_far = {
            "step": self.step,
            "skipped": self.skipped,
            "bad_in_a_row": self.bad_in_a_row,
            "spikes": self.spikes,
            "norms": self.spike_rule.norms,
            "averages": run_on_all_ranks(lambda: self.averages.sums),
            "config": to_dict(with_weights_named(self.config)),
            "inputs": self.task.inputs(),
        }
        run_on_all_ranks(self._restore_run_folder if self.rank == 0 else None)
        save_state(self.state, self.checkpoints, self.step, progress_so_far, self.config.log.keep_last)
        with self._averaged_weights() if self.config.export.weights == "ema" else contextlib.nullcontext():
            run_on_all_ranks(lambda: self.task.export(self.config.run_dir / "export", self.step))
        draws = self.rank == 0 and (is_last or time.monotonic() - self._curves_drawn_at > CURVES_SECONDS)
        run_on_all_ranks(self._draw_curves if draws else None)

    def _restore_run_folder(self) -> None:
        if not (self.config.run_dir / "config.yaml").is_file():
            log.warning("%s is gone; creating it again", self.config.run_dir)
            write_origin(self.config.run_dir, self.config)

    def _draw_curves(self) -> None:
        draw_curves(self.writer.file.read(), self.config.run_dir / "curves.png")
        self._curves_drawn_at = time.monotonic()

    @contextlib.contextmanager
    def _signals_request_stop(self) -> Iterator[None]:
        """Inside the block, signals stop the run after the current step and a checkpoint; a second Ctrl-C interrupts it
        at once. A SIGHUP that is ignored (`nohup`) stays ignored."""

        def request_stop(number: int, frame: Any) -> None:
            if self._stop_signal and number == signal.SIGINT:  # not SIGTERM, which launchers repeat
                raise KeyboardInterrupt
            self._stop_signal = self._stop_signal or number

        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, request_stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
