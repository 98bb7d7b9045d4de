"""Caches that shrink, for `transformers`."""
