"""A run directory: what training writes and all other commands open.

`directory` knows its files and loads model and corpus; `config` is the part of its configuration that all commands
read; `checkpoint` saves and restores the state of training, with `array_checksums`; `index_location` is the index, on
the devices or on the host; `live_corpus` follows a corpus that changes; `lock` keeps two commands from training in one
directory; `verify_artifacts` reads whole artifacts and names what is damaged.
"""
