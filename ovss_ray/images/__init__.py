"""Where images come from: listing, fetching and decoding them. Imports neither torch nor Ray."""

from __future__ import annotations

from ovss_ray.images.decoding import DECODING_VERSION, DEFAULT_MAX_PIXELS, decode_image
from ovss_ray.images.fetching import Fetcher
from ovss_ray.images.listing import DEFAULT_EXTENSIONS, ImageRef, list_images
from ovss_ray.images.stores import StorageOptions, open_store

__all__ = [
    "DECODING_VERSION",
    "DEFAULT_EXTENSIONS",
    "DEFAULT_MAX_PIXELS",
    "Fetcher",
    "ImageRef",
    "StorageOptions",
    "decode_image",
    "list_images",
    "open_store",
]
