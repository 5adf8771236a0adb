"""Calls that go on side by side, so that what all of them ask at a time is answered at once.

Layers choose their masks each for itself, by code that reads like that of one layer, and each choice needs sums over
all processes, one after another. In lockstep every layer goes as far as its next question; then the questions of all
layers travel together. So an update takes as many messages as one layer, whatever the number of layers.

Each call has a thread, of which one at a time runs, in the order of the calls: nothing is done at the same time.
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
    """Whether the code that asks is one of several calls that go on side by side."""
    return getattr(_here, "lane", None) is not None


def ask(question: Any) -> Any:
    """The answer to a question, which comes when all other calls have asked theirs or have ended."""
    return cast("_Lane[Any]", _here.lane).ask(question)


def side_by_side(calls: Sequence[Callable[[], T]], answer: Answer) -> list[T]:
    """Make calls side by side, and return what they return.

    Args:
        calls: They may :func:`ask`, and write to nothing that another reads.
        answer: Called with the questions of all calls that have come to one, in the order of the calls; returns an
            answer to each.

    Raises:
        BaseException: What a call raises, the first of them; the others do not go on then.

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
    """Ends a call whose questions nobody answers any more."""


class _Lane(Generic[T]):
    """A call in a thread of its own, which runs only while its owner waits for it."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        # Locks alone take a third of the time of semaphores; each is released where the other side is to go on.
        self._turn, self._back = threading.Lock(), threading.Lock()
        self._turn.acquire()
        self._back.acquire()
        self._error: BaseException | None = None
        self._stopped = False
        self.has_ended = False
        self.question: Any = None
        self.answer: Any = None
        self.result: T = cast("T", None)
        # What torch keeps for each thread.
        self._gradients = torch.is_grad_enabled()
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Let the call run up to its next question or its end; raise what it raises."""
        self._turn.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the call, wherever it is."""
        if not self.has_ended:
            self._stopped = True
            self._turn.release()
        self._thread.join()

    def ask(self, question: Any) -> Any:
        """Hand a question over and wait for the answer; called by the call."""
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
        except BaseException as error:  # raised where the call was made
            self._error = error
        finally:
            self.has_ended = True
            self._back.release()
