"""What every test shares. XLA reads its flags once, so they are set before anything imports JAX.

The tests ask for right numbers from hundreds of tiny programs: with the optimisers off, these
compile several times faster. A flag already in `XLA_FLAGS` is left as it is.
"""

import importlib.metadata
import os

FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
}
if importlib.metadata.version("jaxlib") < "0.11":  # gone in later ones
    FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
given = os.environ.get("XLA_FLAGS", "")
ours = [f"{flag}={value}" for flag, value in FLAGS.items() if flag not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *ours]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the clients are built from configurations alone

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture
def key():
    """One key for every test, so that a failure repeats."""
    return jax.random.key(0)


@pytest.fixture(autouse=True)
def forgotten(request):
    """Every hundred tests, JAX forgets its compiled programs: thousands of tiny ones fill gigabytes."""
    yield
    done = request.config.stash.get(DONE, 0) + 1
    request.config.stash[DONE] = done
    if done % 100 == 0:
        jax.clear_caches()


DONE = pytest.StashKey[int]()
