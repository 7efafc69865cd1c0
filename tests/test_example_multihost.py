"""`examples/multihost.py` as processes of this machine."""

import hashlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jlora

ROOT = Path(__file__).parents[1]
SCRIPT = [sys.executable, str(ROOT / "examples" / "multihost.py")]

pytestmark = pytest.mark.slow


def environment(devices=1):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # the last one counts
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}


def run(*args, devices=1):
    done = subprocess.run([*SCRIPT, *args], env=environment(devices), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def result(text):
    return re.search(r"norm .* sha256 \w+", text)[0]


def test_two_processes_are_one_with_two_devices(tmp_path):
    """Bit for bit, and so is a run that stops twice: a checkpoint opens on other processes, and on other meshes."""
    folder = str(tmp_path / "run")
    whole = result(run("--local=2", "--steps", "31"))
    assert result(run("--local=1", "--steps", "31", devices=2)) == whole
    run("--local=2", "--steps", "15", "--folder", folder)
    assert "goes on at step 11" in run("--local=1", "--steps", "25", "--folder", folder, devices=2)
    shutil.copytree(folder, tmp_path / "copy")
    resumed = run("--local=2", "--steps", "31", "--folder", folder)
    assert "goes on at step 21" in resumed and result(resumed) == whole
    other = run("--local=1", "--steps", "31", "--folder", str(tmp_path / "copy"), devices=4)
    assert "1 processes, 4 devices" in other and "goes on at step 21" in other
    norms = [float(result(text).split()[1]) for text in (other, resumed)]
    assert abs(norms[0] - norms[1]) <= 1e-6 * norms[1]  # sums over four devices, in another order


def test_what_two_processes_saved_opens_in_one(tmp_path):
    """As the words of `jlora.save` say where there are several."""
    printed = result(run("--local=2", "--steps", "11", "--folder", str(tmp_path / "run")))
    found = importlib.util.spec_from_file_location("multihost", SCRIPT[1])
    example = importlib.util.module_from_spec(found)
    found.loader.exec_module(example)
    base = jax.eval_shape(example.make)
    adapted = jlora.load(tmp_path / "run", base, spec=jlora.LoRA(rank=4, target="kernel"))
    held = b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(adapted.trainable))
    assert printed.endswith(hashlib.sha256(held).hexdigest()[:16])
    jlora.save(tmp_path / "adapter", adapted)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_takes_the_other_down(victim, tmp_path):
    """A killed process takes the other down within a minute, in words that name the one that died."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    args = ["--steps", "1000000", "--coordinator", f"localhost:{port}", "--processes", "2"]
    logs = [open(tmp_path / f"{n}", "w+") for n in range(2)]
    started = [
        subprocess.Popen([*SCRIPT, *args, "--process", str(n)], env=environment(), stdout=logs[n], stderr=logs[n])
        for n in range(2)
    ]
    try:
        until = time.monotonic() + 120
        while "step   10" not in (tmp_path / "0").read_text() and time.monotonic() < until:
            assert all(p.poll() is None for p in started)
            time.sleep(0.5)
        started[victim].kill()
        assert started[1 - victim].wait(60) != 0
    finally:
        for p, log in zip(started, logs, strict=True):
            p.kill()
            p.wait()
            log.close()
    words = "Task 1 heartbeat timeout" if victim else "process 0 is gone"
    until = time.monotonic() + 10  # the witness outlives its process
    while words not in (said := (tmp_path / str(1 - victim)).read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    assert words in said, said
