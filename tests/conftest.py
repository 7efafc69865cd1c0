"""What every test shares. XLA reads its flags once, so they are set before anything imports JAX.

The tests ask for right numbers from thousands of tiny programs: with the optimisers off and each generated as one
module, these compile several times faster; and what one process of a run has compiled, the others, and those that an
example starts, read from a folder that goes with the run. A flag already in `XLA_FLAGS`, and a folder already set, is
left as it is.
"""

import gc
import importlib.metadata
import os
import tempfile

FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
    "--xla_cpu_parallel_codegen_split_count": "1",
}
if importlib.metadata.version("jaxlib") < "0.11":  # gone in later ones
    FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
given = os.environ.get("XLA_FLAGS", "")
ours = [f"{flag}={value}" for flag, value in FLAGS.items() if flag not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *ours]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the clients are built from configurations alone
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # it is where the first process of a run has set it
    COMPILED = tempfile.TemporaryDirectory(prefix="jlora-compiled-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402
import pytest  # noqa: E402

# Traces make thousands of objects a second, and each collection asks JAX's runtime for its garbage, too.
gc.set_threshold(100_000, 20, 50)


def pytest_collection_modifyitems(items):
    """Whole programs first: a run that ended with one of them would end on one core."""
    items.sort(key=lambda item: not item.path.name.startswith(("test_example_", "test_shard.")))


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
