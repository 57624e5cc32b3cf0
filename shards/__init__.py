"""Photos -> WebDataset tar shards with an index; needs neither torch nor DALI."""
