"""Benchmarks, each beside a rival or a physical limit that is measured in the same run.

`stages` times the training steps of a configuration, `train` those of a synthetic load (`synthetic_load`) beside
`torch_rival`. `largest_batch` finds the largest batch that fits in memory. `decode`, `encode` and `search` time
decoding, embedding of passages and search. `machine_limits` measures the limits of the machine.
"""
