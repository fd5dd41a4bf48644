"""Configurations: one ``get_config()`` a file, ``default`` explains all."""
