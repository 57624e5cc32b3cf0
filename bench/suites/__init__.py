"""Named benchmarks, one module per area; each asserts equality before it times."""
