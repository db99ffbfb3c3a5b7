"""Evaluates the answers and the retrieval of a run.

`evaluate` answers a file of questions and scores them with `metrics`; `predictions` has the rows that are scored;
`docs_curve` varies the number of documents; `compare` puts evaluations side by side; `report` writes pages and
pictures.
"""
