"""Measurements against peers; imported by nothing but its tests."""
