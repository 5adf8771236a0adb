"""Make docs/tensorboard.png, the picture in the README: ``python docs/screenshot.py``.

It trains the demo, starts TensorBoard on its logs, and photographs a few curves with a headless Chromium.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PICTURE = Path(__file__).with_name("tensorboard.png")
SIZE = 1440, 1040
PATIENCE = 60.0  # seconds
SHOWN = "flops|s/dead|^sparsity$|layer/|val_"  # nine curves


def main() -> int:
    """Train, serve, photograph; return the exit code 0."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"There is none of {', '.join(BROWSERS)} here. On Debian: sudo apt install chromium-headless-shell.")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "lightning_sparse.zoo.demo"], cwd=folder, check=True)
        with tensorboard(folder) as address:
            photograph(browser, address)
    return 0


@contextmanager
def tensorboard(folder: str) -> Generator[str]:
    """Serve what the demo has left in ``folder``; the value is the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The page shows the path as it is given here.
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", "demo/logs", "--port", str(port)]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(f"{address}/data/plugin/scalars/tags", "sparsity")
            yield address
        finally:
            server.terminate()


def wait_for(url: str, word: str) -> None:
    """Return once ``url`` answers with ``word`` in it: the logs have been read."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                if word in answer.read().decode():
                    return
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.5)
    raise TimeoutError(f"TensorBoard has not read the logs after {PATIENCE:g} s. Look at it yourself: {url}")


def photograph(browser: str, address: str) -> None:
    """Write what the browser shows to :data:`PICTURE`."""
    # The state of TensorBoard's page is in its address.
    state = f"scalars&tagFilter={urllib.parse.quote(SHOWN)}&_smoothingWeight=0"
    command = [
        browser,
        "--headless",
        "--hide-scrollbars",
        "--disable-gpu",
        f"--window-size={SIZE[0]},{SIZE[1]}",
        "--virtual-time-budget=20000",
        f"--screenshot={PICTURE}",
        f"{address}/#{state}",
    ]
    if os.geteuid() == 0:
        command.insert(1, "--no-sandbox")  # Chromium has none for root
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
