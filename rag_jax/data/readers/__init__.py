"""The formats of the field, each a file: a function from parsed records to passages or questions.

`formats` detects which one an input has, and lists them all, one row each; `sources` finds the files behind an
input, `lines` and `json_stream` read them without holding them, `rows` checks the fields. Every error names file and
line.
"""
