"""A run directory: what training leaves behind and everything else opens.

`directory` knows its files and loads model and corpus; `checkpoint` saves and restores all of a run, with
`array_checksums`; `index_location` is the index, on the devices or on the host; `live_corpus` follows a corpus that
changes; `lock` keeps two commands apart;
`verify_artifacts` reads whole runs, and what they were made from, and names what is damaged.
"""
