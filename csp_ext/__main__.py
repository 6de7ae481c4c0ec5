"""``python -m csp_ext`` is the ``csp`` command; launchers of several processes want a module."""

from csp_ext.cli import main

main(prog_name="csp")
