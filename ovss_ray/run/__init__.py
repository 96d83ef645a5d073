"""Labelling runs: manifest, run directory, scheduler, driver, worker, progress."""
