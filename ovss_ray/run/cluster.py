"""The Ray cluster that work runs on: one that is there, or one embedded in this process."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from ovss_ray.errors import RunFailedError
from ovss_ray.run.interrupts import held_interrupts

if TYPE_CHECKING:
    from ovss_ray.run.embedded import EmbeddedRay


def cluster_address(configured: str | None) -> str | None:
    """The address of the cluster: as configured, or as RAY_ADDRESS says; None for an embedded Ray."""
    return configured or os.environ.get("RAY_ADDRESS")


class Connection:
    """This process's connection to Ray; one that it had before is used, and left as it is.

    Attributes:
        embedded: the Ray that was started for it, if there is one.

    Args:
        address: of the cluster, as configured; None for `RAY_ADDRESS`, or else an embedded Ray.

    Raises:
        RunFailedError: the cluster cannot be reached, or the embedded Ray not started.
        KeyboardInterrupt: SIGINT has come; it waits until Ray is there, a second one does not.
    """

    def __init__(self, address: str | None) -> None:
        import ray

        self.embedded: EmbeddedRay | None = None
        self._made_here = not ray.is_initialized()
        if self._made_here:
            try:
                with held_interrupts():
                    self._connect(cluster_address(address))
            except KeyboardInterrupt:
                self.close()
                raise

    def _connect(self, address: str | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            if address:
                import ray

                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            else:
                from ovss_ray.run.embedded import EmbeddedRay

                self.embedded = EmbeddedRay()
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            place = f"the Ray cluster at {address}" if address else "an embedded Ray"
            raise RunFailedError(f"{place} could not be reached or started: {' '.join(str(error).split())}") from error

    def close(self, *, keep_logs: bool = False) -> None:
        """End what was begun here.

        Args:
            keep_logs: those of an embedded Ray may still be of use.
        """
        if self.embedded is not None:
            self.embedded.close(keep_logs=keep_logs)
        elif self._made_here:
            import ray

            ray.shutdown()
