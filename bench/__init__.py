"""Measurements against peers; imported by experiments/ and tests alone."""
