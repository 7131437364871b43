"""Many models at a time, each in one of some processes."""

import logging
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from .registry import find, models
from .run import Result, run


def quiet() -> None:
    """Nothing is downloaded, and only the pass is of interest."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def start_worker() -> None:
    quiet()
    torch.set_num_threads(1)
    models()


def run_one(name: str, mode: str, settings: dict[str, Any]) -> Result:
    return run(find(name), mode, **settings)


def run_all(chosen: list[tuple[str, str]], settings: dict[str, Any], jobs: int) -> Iterator[Result]:
    """Results as they come."""
    if jobs == 1:
        yield from (run_one(name, mode, settings) for name, mode in chosen)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=start_worker) as pool:
        for future in as_completed([pool.submit(run_one, name, mode, settings) for name, mode in chosen]):
            yield future.result()
