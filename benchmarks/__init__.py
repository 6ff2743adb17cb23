"""Measurements against published numbers and against other ways of doing the same."""
