"""The embedded data and where data is found; not installed, imported by the scripts from the checkout."""
