"""Faults for tests, put into a rank from outside the product: PYTHONPATH holds this folder, FAULT
says what and where.

FAULT="rank:place:action": at place "load" (the rank's first weight) or "step" (its fifth step), the
action "raise", "hang" (in Python, heartbeats go on) or "exit".
"""

import os
import sys
import time

rank, place, action = (os.environ.get("FAULT") or "::").split(":")


def strike() -> None:
    if action == "raise":
        raise ValueError("a fault was planted here")
    if action == "hang":
        time.sleep(1000)
    os._exit(7)


def wrapped(function, count: int):
    calls = [0]

    def inner(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            strike()
        return function(*args, **kwargs)

    return inner


class Planter:
    """An import hook: wraps the product's function as soon as its module has been imported."""

    TARGETS = {
        "load": ("llama_tp.model.destinations", "Destinations", "mark_loaded", 1),
        "step": ("llama_tp.engine.runner", "Runner", "run", 5),
    }

    def find_spec(self, name, path=None, target=None):
        module, owner, method, count = self.TARGETS[place]
        if name != module:
            return None
        sys.meta_path.remove(self)
        import importlib.util

        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(loaded):
            execute(loaded)
            kind = getattr(loaded, owner)
            setattr(kind, method, wrapped(getattr(kind, method), count))

        spec.loader.exec_module = exec_module
        return spec


if place and rank == os.environ.get("RANK"):
    sys.meta_path.insert(0, Planter())
