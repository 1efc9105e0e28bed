"""Programs for CPUs are compiled with fewer passes where XLA's optimizations are off.

JAX's `jax_disable_most_optimizations` leaves on the emitters of fusions, which take
half of the time that is left. A program's options are set in one place, inside of JAX.
"""

import jax
from jax._src import compiler

OPTIONS = {"xla_cpu_use_fusion_emitters": False}


def install() -> None:
    """Change how this process compiles; an XLA without the option stays as it is."""
    try:
        jax.jit(lambda: 0, compiler_options=OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return
    original = compiler.get_compile_options

    def options(*args, backend, **kwargs):
        made = original(*args, backend=backend, **kwargs)
        flags = made.executable_build_options.debug_options
        if flags.xla_llvm_disable_expensive_passes and backend.platform == "cpu":
            made.env_option_overrides = [*OPTIONS.items(), *made.env_option_overrides]
        return made

    compiler.get_compile_options = options
