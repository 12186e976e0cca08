"""Sets up the process of a test before JAX is imported: on the CPU, as eight devices for the sharding tests."""

import gc
import importlib.metadata
import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests of tiny models spend nearly all their time on compilation. Without optimisation it takes two thirds of the time.
# Results are the same up to rounding.
XLA_FLAGS = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones have MLIR's slower emitters alone
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS} --xla_force_host_platform_device_count=8"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The workers of one test run and the processes that they start share compiled programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="lidit_jax_tests_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Tracing makes millions of small objects, nearly all of which live on: looking through them often takes a tenth of the
# time and finds nothing.
gc.set_threshold(100_000, 50, 50)
