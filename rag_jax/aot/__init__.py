"""Whether a configuration fits on chips that are not here, and how fast it can be there.

`compile` compiles `stage_programs` ahead of time for a topology; `memory` says what one needs on a device;
`layer_extrapolation` reckons many layers from few;
`hlo` and `operation_count` read work and memory from programs; `hardware` has what chips can do by data sheet.
"""
