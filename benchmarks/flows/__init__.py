"""Normalizing flows beside zuko, nflows, normflows and the transforms of Pyro."""
