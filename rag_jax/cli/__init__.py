"""The command line: one file for each command, with `configure(parser)` and `run(args)`.

Arguments are parsed here and nowhere else; what a command does is in the package that it belongs to.
`rag_jax.__main__` has the table of commands, `bench` that of benchmarks. Options that several commands share are in
`answer_options`, `process_options` and `load_options`.
"""
