"""What every test needs: one thread a process, a port of its own, and a folder for whatever an example writes."""

from __future__ import annotations

import os
import sys

# Before torch is imported: libgomp hangs in forked children when the parent has used more than one thread.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

from tests.ports import free_port

torch.set_num_threads(1)

# torch.compile pretends that there is a GPU. If the first backward of the process comes after that, autograd starts a
# thread for it, and forked children refuse to go on.
torch.ones((), requires_grad=True).backward()

# A machine under load must not fail a test that is right.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(autouse=True)
def _like_a_new_program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [sys.argv[0]])  # LightningCLI warns of a command line beside its arguments
    # Lightning leaves the port of the first fit of several processes to all later ones, which may find it taken.
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(request.getfixturevalue("tmp_path"))
