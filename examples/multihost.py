"""Fine-tuning on several hosts, one process a host; every process runs this same file.

    make multihost                                                       two processes on this machine, CPU alone
    python examples/multihost.py                                         on each host of a TPU pod slice
    srun python examples/multihost.py                                    on Slurm, one task a node
    python examples/multihost.py --coordinator HOST:PORT --processes 2 --process 0      anywhere else, once a process

`jax.distributed.initialize` finds the other processes by itself on TPUs and under Slurm. Each process makes its own
rows of every batch; the step is one program over all devices. A process that dies takes the others down: at once if it
was process 0, which their witnesses then name (`witness`), else after `HEARTBEAT` seconds at most, and JAX's
coordination service, which runs in process 0, names it.
Started again with the same --folder, on as many processes as there are then, all go on from the last checkpoint.
Process 0 prints. Two processes and one with two devices print the same digest.
"""

import argparse
import contextlib
import hashlib
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

WIDE, INNER, LAYERS, ROWS, HEARTBEAT = 64, 128, 4, 32, 20


def make():
    """The base: runs under jit on all processes, each keeps its shards."""
    up, down = jax.random.split(jax.random.key(0))
    draw = lambda key, *shape: jax.random.normal(key, (LAYERS, *shape)) / 8
    return {"layers": {"up": {"kernel": draw(up, WIDE, INNER)}, "down": {"kernel": draw(down, INNER, WIDE)}}}


def model(params, x):
    def layer(x, p):
        return x + jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"], None

    return jax.lax.scan(layer, x, params["layers"])[0]


def rows(step, start, stop):
    """Rows of a batch by number, so that every process makes its own and any number of processes the same batch."""
    draw = lambda n: np.random.default_rng((step, n)).standard_normal((2, WIDE)).astype(np.float32)
    x, y = np.stack([draw(n) for n in range(start, stop)], 1)
    return {"x": x, "y": y}


def load(step, sharding):
    """A global batch of which each process makes its slice."""
    each = ROWS // jax.process_count()
    own = rows(step, jax.process_index() * each, (jax.process_index() + 1) * each)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a, (ROWS, *a.shape[1:])), own)


def main(args):
    say = print if jax.process_index() == 0 else lambda *_, **__: None
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
    say(f"{jax.process_count()} processes, {jax.device_count()} devices", flush=True)
    adapted = jlora.shard.init(make, jlora.LoRA(rank=4, target="kernel"), mesh, "fsdp")
    apply = jlora.lift(model)
    loss = lambda adapted, batch: jnp.mean((apply(adapted, batch["x"]) - batch["y"]) ** 2)
    tx = optax.adamw(1e-2)
    step = jlora.shard.train_step(loss, tx, mesh, adapted, batch=P("fsdp"), clip=1.0)
    trainable, frozen = jlora.split(adapted)
    state = jax.jit(tx.init, out_shardings=jlora.shard.state_shardings(tx, adapted))(trainable)

    options = ocp.CheckpointManagerOptions(save_interval_steps=10, max_to_keep=2, enable_async_checkpointing=False)
    keep = ocp.CheckpointManager(args.folder.resolve(), options=options) if args.folder else None
    with keep or contextlib.nullcontext():
        first = 0
        if keep is not None and keep.latest_step() is not None:
            like = ocp.args.StandardRestore({"trainable": trainable, "state": state})
            found = keep.restore(keep.latest_step(), args=like)
            trainable, state, first = found["trainable"], found["state"], keep.latest_step() + 1
            say(f"goes on at step {first}", flush=True)
        for n in range(first, args.steps):
            batch = load(n, NamedSharding(mesh, P("fsdp")))
            trainable, state, metrics = step(trainable, state, frozen, batch)
            if n % 10 == 0 or n == args.steps - 1:
                say(f"step {n:4d}  loss {float(metrics['loss']):.6f}", flush=True)
            if keep is not None:
                keep.save(n, args=ocp.args.StandardSave({"trainable": trainable, "state": state}))
    whole = jax.jit(lambda t: t, out_shardings=NamedSharding(mesh, P()))(trainable)
    bytes_ = b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(whole))
    say(f"norm {float(optax.global_norm(whole)):.6f}  sha256 {hashlib.sha256(bytes_).hexdigest()[:16]}")


WITNESS = """
import socket, sys
own, host, port = sys.argv[1:]
if sys.stdin.read() != "done":  # its end of the pipe is closed by a death of any kind
    try:
        socket.create_connection((host, int(port)), 5).close()
    except OSError:
        print(f"process {own} ends: process 0 is gone, nothing answers at {host}:{port}", file=sys.stderr, flush=True)
"""


@contextlib.contextmanager
def witness(coordinator):
    """While it is open, the loss of process 0 is reported by that name.

    JAX ends a process that has lost the coordination service from within, in the midst of whatever it does, and says
    that a socket was closed. So process 0 listens at a port of its own, and each of the others has a small process
    beside it, which outlives it and looks whether process 0 does.
    """
    host = coordinator.rsplit(":", 1)[0] if coordinator else socket.gethostname()
    with socket.create_server(("", 0)) as listening:
        own = f"{host} {listening.getsockname()[1]}".encode().ljust(300)
        of_0 = multihost_utils.broadcast_one_to_all(np.frombuffer(own, np.uint8))
        where = bytes(np.asarray(of_0, np.uint8)).decode().split()
        if jax.process_index() == 0:
            yield
            return
        command = [sys.executable, "-c", WITNESS, str(jax.process_index()), *where]
        with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as beside:
            yield
            beside.communicate("done")


def local(processes):
    """This script in several processes on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    rest = [a for a in sys.argv[1:] if not a.startswith("--local")]
    command = [sys.executable, __file__, *rest, "--coordinator", address, "--processes", str(processes)]
    started = [subprocess.Popen([*command, "--process", str(n)]) for n in range(processes)]
    lost = None
    while any(p.poll() is None for p in started):
        time.sleep(0.1)
        if lost is None and (lost := next((n for n, p in enumerate(started) if p.poll()), None)) is not None:
            print(f"process {lost} of {processes} is lost (exit code {started[lost].poll()})", flush=True)
    return max(abs(p.wait()) for p in started)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="for checkpoints, one that all hosts see")
    parser.add_argument("--local", type=int, metavar="N", help="start N processes on this machine (--local=2)")
    parser.add_argument("--coordinator", help="host:port of process 0")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    args = parser.parse_args()
    if args.local:
        sys.exit(local(args.local))
    found = (args.coordinator, args.processes, args.process)
    if args.coordinator and jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(*found, heartbeat_timeout_seconds=HEARTBEAT)
    with witness(args.coordinator):
        main(args)
