"""What a stage changes in the process of its caller, and how it is undone."""

import copy
import gc
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import datasets
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime
from omegaconf.basecontainer import BaseContainer
from transformers.utils import logging as transformers_logging

from llm2rec.core.seed import random_state

__all__ = ["state_restored"]

_OF_A_COMMAND = (GlobalHydra, HydraConfig, JobRuntime)  # Hydra's singletons


@contextmanager
def state_restored() -> Iterator[None]:
    """Context for a stage: it starts as in a new process, and what it changes is undone afterwards."""
    folder, arguments, environment, restore_random = os.getcwd(), sys.argv, dict(os.environ), random_state()
    with ExitStack() as stack:
        for part in (_torch, _libraries, _hydra, _logging, _signals, warnings.catch_warnings):
            stack.enter_context(part())
        try:
            yield
        finally:
            os.chdir(folder)
            sys.argv = arguments
            os.environ.clear()
            os.environ.update(environment)
            restore_random()
    gc.collect()  # the stage's model


@contextmanager
def _torch() -> Iterator[None]:
    """Torch's global settings, those of a new process while the context is open; the number of threads stays."""
    cudnn = torch.backends.cudnn
    benchmark, deterministic_cudnn = cudnn.benchmark, cudnn.deterministic
    precision, n_threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.set_float32_matmul_precision("highest")
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.use_deterministic_algorithms(False)
        cudnn.benchmark = cudnn.deterministic = False
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(dtype)
        torch.set_default_device(None if device == torch.device("cpu") else device)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_num_threads(n_threads)
        cudnn.benchmark, cudnn.deterministic = benchmark, deterministic_cudnn


@contextmanager
def _libraries() -> Iterator[None]:
    """Accelerate's state of this process, and progress bars of libraries."""
    states = {kind: dict(kind._shared_state) for kind in (AcceleratorState, GradientState, PartialState)}
    of_datasets, of_hub = datasets.are_progress_bars_disabled(), are_progress_bars_disabled()
    of_transformers = transformers_logging.is_progress_bar_enabled()
    for kind in states:
        kind._shared_state.clear()
    try:
        yield
    finally:
        for kind, values in states.items():
            kind._shared_state.clear()
            kind._shared_state.update(values)
        (datasets.disable_progress_bars if of_datasets else datasets.enable_progress_bars)()
        (transformers_logging.enable_progress_bar if of_transformers else transformers_logging.disable_progress_bar)()
        (disable_progress_bars if of_hub else enable_progress_bars)()


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra's singletons, and the resolvers of OmegaConf."""
    store = ConfigStore.instance()
    singletons, resolvers, nodes = Singleton._instances, dict(BaseContainer._resolvers), copy.deepcopy(store.repo)
    Singleton._instances = {kind: each for kind, each in singletons.items() if kind not in _OF_A_COMMAND}
    try:
        yield
    finally:
        Singleton._instances, BaseContainer._resolvers, store.repo = singletons, resolvers, nodes


@contextmanager
def _logging() -> Iterator[None]:
    """Handlers, levels and filters of all loggers; the stage's log file is closed."""
    root = logging.getLogger()
    loggers = [root, *(each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger))]
    ours = logging.getLogger("llm2rec")
    loggers += [ours] * (ours not in loggers)
    before = [(each, each.level, each.propagate, each.disabled, each.handlers[:]) for each in loggers]
    disabled = root.manager.disable
    try:
        yield
    finally:
        for logger, level, propagate, is_disabled, handlers in before:
            for handler in set(logger.handlers) - set(handlers):
                handler.close()
            logger.handlers[:], logger.propagate, logger.disabled = handlers, propagate, is_disabled
            logger.setLevel(level)
        logging.disable(disabled)


@contextmanager
def _signals() -> Iterator[None]:
    """Handlers of the signals that stages and libraries handle."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # set by other code than Python's
                signal.signal(number, handler)
