"""What an evaluation leaves for people: pages and pictures.

`write_report` writes all of it into a directory; `markdown` is the one page of a run, `html` a page to browse
answers, from `templates`; `evaluation_plots` and `training_plot` draw.
"""
