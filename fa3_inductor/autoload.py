"""What torch calls at the end of ``import torch``, in every process where this package is installed."""

import os


def autoload() -> None:
    """Prepares the pass for the stock Inductor backend when ``FA3_INDUCTOR`` is set; does nothing when it is not.

    Only import hooks are put in place here. Whether graphs are rewritten is read from ``config.enabled`` (which
    has ``FA3_INDUCTOR`` as its default) when a graph is compiled.
    """
    if os.environ.get("FA3_INDUCTOR"):
        from fa3_inductor import compat

        compat.hook_compile_fx()
        compat.prepare_dynamo()
