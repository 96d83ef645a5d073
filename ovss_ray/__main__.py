"""`python -m ovss_ray` is the command `ovss-ray`."""

from ovss_ray.cli import main

main()
