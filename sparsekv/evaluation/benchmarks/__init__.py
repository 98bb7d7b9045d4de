"""Benchmarks: rows in kvpress's schema, and the scores that kvpress gives them."""
