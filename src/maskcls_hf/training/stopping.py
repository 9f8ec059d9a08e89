"""Ctrl-C, SIGTERM and a terminal that closes (SIGHUP) end a training after its step, with a checkpoint.

A second signal ends it at once.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import TrainerCallback

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_ECHO_SECONDS = 1.0  # a launcher passes on to its processes the Ctrl-C that they have had from the terminal


class TrainingStopped(KeyboardInterrupt):
    """A training was stopped by a signal. `exit_code` is 128 + its number, as shells have it.

    Args:
        message: for the user.
        number: of the signal.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = 128 + number


class EvaluationStopped(Exception):
    """Inside an evaluation, all processes have agreed to stop."""


class StopSignals:
    """What [`stop_signals`] gives: which signal has come, and what is to be done about it.

    `step` is the last one that is done, None before the training; the loop keeps it up to date.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.step: int | None = None
        self._agreed = False
        self._patient = False
        self._since = 0.0
        self._process = os.getpid()

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Inside, a first signal is only noted, for the loop to ask for it with `agreed`; elsewhere it ends all."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def agreed(self, device: torch.device | str = "cpu") -> bool:
        """Whether any process has had a signal. All of them call it at the same place, and get the same answer."""
        if not self._agreed:
            number = self.number or 0
            if dist.is_available() and dist.is_initialized():
                shared = torch.tensor(number, device=device)
                dist.all_reduce(shared, dist.ReduceOp.MAX)
                number = int(shared)
            if number:
                self.number, self._agreed = number, True
        return self._agreed

    def stopped(self, advice: str = "go on with --resume") -> TrainingStopped:
        """The error to raise; `advice` says how to go on."""
        number = self.number or signal.SIGINT
        after = "before the first step of this run" if self.step is None else f"after step {self.step}, {advice}"
        return TrainingStopped(f"{signal.Signals(number).name}: stopped {after}", number)

    def handle(self, number: int, frame: Any = None) -> None:
        """The handler of signals, which Python calls.

        Args:
            number: of the signal.
            frame: not looked at.

        Raises:
            TrainingStopped: outside of `patient`, and of a second signal.
        """
        if os.getpid() != self._process:
            return  # a forked worker
        now = time.monotonic()
        is_echo = int(os.environ.get("WORLD_SIZE", 1)) > 1 and now - self._since < _ECHO_SECONDS
        if self.number is None:
            self.number, self._since = number, now
            if not self._patient:
                raise self.stopped()
            _say(f"\n{signal.Signals(number).name}: the step ends and a checkpoint is written; again: ends at once.\n")
        elif not is_echo:
            signal.signal(number, signal.SIG_DFL)
            self.number = number
            raise self.stopped("at once: go on from the last checkpoint with --resume")


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Inside, `SIGNALS` are handled by the [`StopSignals`] that it gives; afterwards as before.

    Only the main thread may handle signals: in another one nothing changes. What is ignored (`nohup`) stays ignored.
    """
    stop, previous = StopSignals(), {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        previous = {n: handler for n, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in previous:
            signal.signal(number, stop.handle)
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopTraining(TrainerCallback):
    """[`StopSignals`] for `MaskClsTrainer`: a signal ends the training after its step or in an evaluation.

    It ends with a checkpoint; a resume begins with the evaluation that it has kept out.

    Args:
        stop: the signals that have come, see [`stop_signals`].
    """

    def __init__(self, stop: StopSignals):
        self.stop = stop
        self._saved = -1  # step of the last checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes the step at which the training begins or goes on."""
        self.stop.step = state.global_step or None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for the evaluation that a signal has kept out."""
        step = state.global_step
        if args.eval_strategy == "steps" and step and step % args.eval_steps == 0:
            done = any(entry.get("step") == step and "eval_loss" in entry for entry in state.log_history)
            control.should_evaluate = not done

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the training with a checkpoint, without an evaluation."""
        self.stop.step = state.global_step
        if self.stop.agreed(args.device):
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends an evaluation.

        Raises:
            EvaluationStopped: in all processes.
        """
        if self.stop.agreed(args.device):
            raise EvaluationStopped

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for the checkpoint of a training that was stopped in the evaluation after a step."""
        stops = control.should_training_stop and self.stop.agreed(args.device)
        if stops and self._saved != state.global_step:  # stopped in the evaluation after the step
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends a training that a signal has reached while a checkpoint was written."""
        self._saved = state.global_step
        if self.stop.agreed(args.device):  # while it was written: no step more
            control.should_training_stop = True


def shield_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Let the workers of a loader outlive signals to the whole group (Ctrl-C, Slurm's SIGTERM): the step needs them."""
    inner = getattr(loader, "base_dataloader", loader)
    if inner.num_workers and getattr(inner.worker_init_fn, "func", None) is not _start_worker:
        inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn)
    return loader


def _start_worker(initialize: Any, worker: int) -> None:
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()
    if initialize is not None:
        initialize(worker)


def _end_with_parent() -> None:
    """SIGTERM from the process that has started this worker ends it, as ever; from others it does not."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def end(stopped: TrainingStopped) -> NoReturn:
    """End a script: a line on standard error, by the main process, and the exit code."""
    if _is_main():
        with unread():
            print(stopped, file=sys.stderr, flush=True)
    sys.exit(stopped.exit_code)


def _say(text: str) -> None:
    """Not with `print`, which a handler may have interrupted."""
    if _is_main():
        with unread():
            os.write(2, text.encode())


@contextmanager
def unread() -> Iterator[None]:
    """Around output on standard error, which goes nowhere from when nobody reads it any more.

    A Ctrl-C ends the `tee` behind the training too, and SIGHUP comes when the terminal has gone.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
