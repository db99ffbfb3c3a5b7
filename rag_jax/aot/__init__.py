"""Whether a configuration fits on chips that are not here, and how fast it can be there.

`compile` compiles `stage_programs` ahead of time for a topology. `memory` reports what a program needs on a device.
`layer_extrapolation` estimates many layers from few. `hlo` and `operation_count` read work and memory from programs.
`hardware` has the rates of chips by data sheet.
"""
