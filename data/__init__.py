"""The embedded data, and how names become data. Not installed: the scripts import it from the checkout."""
