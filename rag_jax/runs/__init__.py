"""A run directory: what training leaves behind and everything else opens.

`directory` knows its files and loads model and corpus; `checkpoint` saves and restores all of a run, with
`array_checksums`; `lock` keeps two commands apart; `live_corpus` follows a corpus that changes;
`verify_artifacts` reads whole runs, and what they were made from, and names what is damaged.
"""
