"""The command line: a file a command, each with `configure(parser)` and `run(args)`.

Arguments are read here and nowhere else; what a command does is in the room that it belongs to. `rag_jax.__main__`
has the table of commands, `bench` that of benchmarks. Options that commands share are in `answer_options`,
`process_options` and `load_options`.
"""
