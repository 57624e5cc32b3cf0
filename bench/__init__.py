"""Throughput records that can be compared across machines, and the demo of the whole way."""
