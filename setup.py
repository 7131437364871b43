"""The part of the packaging that pyproject.toml cannot say: kernels/ and patterns/ are packages inside fa3_inductor."""

from setuptools import find_namespace_packages, setup

PLACES = {"fa3_inductor": "fa3_inductor", "fa3_inductor.kernels": "kernels", "fa3_inductor.patterns": "patterns"}

setup(
    package_dir=PLACES,
    packages=[
        name
        for package, folder in PLACES.items()
        for name in [package, *(f"{package}.{inner}" for inner in find_namespace_packages(folder))]
        if "__pycache__" not in name
    ],
)
