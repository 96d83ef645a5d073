"""Estimates are checked against runs, on the same pictures."""

from tests.run.conftest import make_spec, photos

__all__ = ["make_spec", "photos"]
