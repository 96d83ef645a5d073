"""What processes of `tests.processes.ovss_ray` have imported before they begin: nothing runs on import."""

import aiohttp  # noqa: F401
import duckdb  # noqa: F401
import open_clip  # noqa: F401
import pyarrow.parquet  # noqa: F401
import scipy.ndimage  # noqa: F401
import torch  # noqa: F401

import ovss_ray.cli
import ovss_ray.run.driver
import ovss_ray.run.worker  # noqa: F401
