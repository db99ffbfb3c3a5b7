"""Measurements, each beside a rival or a limit that is measured in the same run.

`stages` times the steps of a configuration, `train` a synthetic load (`synthetic_load`) beside `torch_rival`,
`largest_batch` finds what fits; `decode`, `encode` and `search` time the rest; `machine_limits` measures what the
machine allows.
"""
