"""The Ray cluster that work runs on: one that is there, or one embedded in this process."""

from __future__ import annotations

import logging
import os

from ovss_ray.errors import RunFailedError
from ovss_ray.run.interrupts import held_interrupts


def cluster_address(configured: str | None) -> str | None:
    """The address of the cluster: as configured, or as RAY_ADDRESS says; None for an embedded Ray."""
    return configured or os.environ.get("RAY_ADDRESS")


def connect(address: str | None) -> None:
    """Connect this process to the cluster at `address`, or start an embedded one if that is None.

    Raises:
        RunFailedError: it cannot be reached or started.
        KeyboardInterrupt: SIGINT has come; it waits until Ray is there, a second one does not.
    """
    with held_interrupts():
        _connect(address)


def _connect(address: str | None) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            # Pixels never pass through the object store, so the embedded one can be small.
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=100 * 2**20,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        place = f"the Ray cluster at {address}" if address else "an embedded Ray"
        raise RunFailedError(f"{place} could not be reached or started: {' '.join(str(error).split())}") from error
