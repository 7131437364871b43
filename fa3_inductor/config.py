"""Settings, as a torch-style config module: assign (``config.target = "sdpa"``), scope (``with
config.patch(target="sdpa"):``), or set the environment variable named beside each. All but ``enabled`` are also keys
of ``torch.compile(..., options={...})`` with ``backend="fa3_inductor"``, by their own name or as
``"fa3_inductor.<name>"``.

As for torch's own configs, assignments are per thread from torch 2.12 on. A value that a setting cannot have raises
ValueError at once.
"""

import sys

from torch.utils._config_module import Config, install_config_module

# Rewrite the graphs that the stock "inductor" backend compiles. backend="fa3_inductor" always rewrites.
# @compile_ignored
enabled: bool = Config(default=False, env_name_default="FA3_INDUCTOR")

# What fused attentions run on: "auto" picks "hopper" on an sm_90 GPU and "sdpa" elsewhere; "reference" is plain
# PyTorch with the kernels' numerics, slow and meant for tests.
target: str = Config(default="auto", env_name_default="FA3_INDUCTOR_TARGET")

# Folder for the graphs before and after the pass and for the reports; None writes nothing.
# @compile_ignored
dump_dir: str | None = Config(default=None, env_name_default="FA3_INDUCTOR_DUMP")

# What a query gets when every key is masked: "exact" keeps what the user's code gives, "relaxed" allows zeros.
empty_rows: str = Config(default="exact", env_name_default="FA3_INDUCTOR_EMPTY_ROWS")

# Attention in FP8, in inference on the Hopper kernels: "graph" where q, k and v are float8_e4m3fn times a scale,
# "quantize" everywhere, by rounding q, k and v to that, "off" nowhere.
fp8: str = Config(default="graph", env_name_default="FA3_INDUCTOR_FP8")

# Sum up the gradient of q in one order on the Hopper kernels, so that training repeats bit by bit.
# torch.use_deterministic_algorithms asks for it too.
deterministic_backward: bool = Config(default=False, env_name_default="FA3_INDUCTOR_DETERMINISTIC_BACKWARD")

# What "quantize" multiplies q and k with before it rounds them is made of random signs; this is their seed. None leaves
# the multiplication out.
fp8_incoherent_seed: int | None = 0


def _install() -> None:
    module = sys.modules[__name__]
    install_config_module(module)

    # FA3_INDUCTOR= (set but empty) means unset, as for most programs.
    allowed = {
        "enabled": (True, False, ""),
        "deterministic_backward": (True, False, ""),
        "target": ("auto", "hopper", "sdpa", "reference"),
        "empty_rows": ("exact", "relaxed"),
        "fp8": ("graph", "quantize", "off"),
    }

    def check(name: str, value: object) -> None:
        if name in allowed and not any(value == choice and type(value) is type(choice) for choice in allowed[name]):
            choices = ", ".join(repr(choice) for choice in allowed[name] if choice != "")
            raise ValueError(f"fa3_inductor.config.{name} is one of {choices}, got {value!r}")
        if name == "dump_dir" and not isinstance(value, (str, type(None))):
            raise ValueError(f"fa3_inductor.config.dump_dir is the path of a folder or None, got {value!r}")
        if name == "fp8_incoherent_seed" and not (value is None or type(value) is int):
            raise ValueError(f"fa3_inductor.config.fp8_incoherent_seed is an int or None, got {value!r}")

    class CheckedConfig(type(module)):
        def __setattr__(self, name: str, value: object) -> None:
            check(name, value)
            super().__setattr__(name, value)

    for name, value in module.get_config_copy().items():
        check(name, value)
    # The installed module refuses to set anything but its settings, its class included.
    type(sys).__setattr__(module, "__class__", CheckedConfig)


_install()
