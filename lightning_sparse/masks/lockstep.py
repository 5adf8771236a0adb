"""Run calls side by side, so that their questions are answered together.

Each layer chooses its masks by itself, with code that reads like code for one layer. Each choice needs several sums
over all processes, one after another. In lockstep, every layer runs to its next question; then the questions of all
layers travel together. So an update sends as many messages as one layer needs, whatever the number of layers.

Each call has a thread of its own. Only one thread runs at a time, in the order of the calls: nothing runs in parallel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

import torch

__all__ = ["ask", "in_lockstep", "side_by_side"]

T = TypeVar("T")
Answer = Callable[[list[Any]], Sequence[Any]]

_here = threading.local()


def in_lockstep() -> bool:
    """Whether the current code belongs to one of several calls that run side by side."""
    return getattr(_here, "lane", None) is not None


def ask(question: Any) -> Any:
    """Return the answer to a question. It comes when all other calls have asked theirs or have ended."""
    return cast("_Lane[Any]", _here.lane).ask(question)


def side_by_side(calls: Sequence[Callable[[], T]], answer: Answer) -> list[T]:
    """Run calls side by side, and return their results.

    Args:
        calls: They may call :func:`ask`. They must not write to anything that another call reads.
        answer: Called with the questions of all calls that wait for an answer, in the order of the calls; returns
            one answer for each.

    Raises:
        BaseException: The first exception that a call raises; the other calls are then stopped.

    Example:
        >>> side_by_side([lambda: ask(2) + 1, lambda: ask(3) + 1], lambda questions: [sum(questions)] * len(questions))
        [6, 6]
    """
    lanes = [_Lane(call) for call in calls]
    going = lanes
    try:
        while going:
            for lane in going:
                lane.go_on()
            going = [lane for lane in going if not lane.has_ended]
            answers = answer([lane.question for lane in going]) if going else ()
            for lane, its in zip(going, answers, strict=True):
                lane.answer = its
    finally:
        for lane in lanes:
            lane.stop()
    return [lane.result for lane in lanes]


class _StoppedError(BaseException):
    """Stops a call whose question will not be answered."""


class _Lane(Generic[T]):
    """A call in a thread of its own. It runs only while the caller waits for it."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        # Locks take a third of the time of semaphores. Releasing one lets the other side go on.
        self._turn, self._back = threading.Lock(), threading.Lock()
        self._turn.acquire()
        self._back.acquire()
        self._error: BaseException | None = None
        self._stopped = False
        self.has_ended = False
        self.question: Any = None
        self.answer: Any = None
        self.result: T = cast("T", None)
        # State that torch keeps for each thread.
        self._gradients = torch.is_grad_enabled()
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Let the call run to its next question or its end; raise its exception, if any."""
        self._turn.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Stop the call, wherever it waits."""
        if not self.has_ended:
            self._stopped = True
            self._turn.release()
        self._thread.join()

    def ask(self, question: Any) -> Any:
        """Hand over a question and wait for the answer. The call itself uses this."""
        self.question = question
        self._back.release()
        self._wait()
        return self.answer

    def _wait(self) -> None:
        self._turn.acquire()
        if self._stopped:
            raise _StoppedError

    def _run(self) -> None:
        _here.lane = self
        try:
            self._wait()
            if self._device is not None:
                torch.cuda.set_device(self._device)
            with torch.set_grad_enabled(self._gradients):
                self.result = self._call()
        except _StoppedError:
            pass
        except BaseException as error:  # raised again by go_on, in the caller's thread
            self._error = error
        finally:
            self.has_ended = True
            self._back.release()
