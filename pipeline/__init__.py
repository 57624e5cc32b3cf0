"""Shards -> two augmented views per image: order, reader, draws, and the backends that make views."""
