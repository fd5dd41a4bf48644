"""Run the command line: ``python -m topd_jax.cli COMMAND``."""

from topd_jax.cli.main import main

main()
