"""The formats of the field, each a file: a function from parsed records to passages or questions.

`formats` finds out which one an input has, and is where a new one gets its row; `sources` finds the files behind an
input, `lines` and `json_stream` read them without holding them, `rows` checks the fields. Every error names file and
line.
"""
